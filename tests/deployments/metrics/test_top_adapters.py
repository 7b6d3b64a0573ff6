"""Labels stay few, whoever is asked for."""

from __future__ import annotations

from deployments.metrics.top_adapters import HALFLIFE_S, OTHER, TopAdapters
from tests.cluster.clocks import ManualClock


def test_a_thousand_adapters_share_a_few_labels() -> None:
    top = TopAdapters(20, ManualClock())
    for number in range(10_000):
        top.asked(f"adapter-{number % 1000}")
    assert len(top.labels) == 20


def test_who_loses_a_label_is_told_once_and_nobody_loses_one_unseen() -> None:
    clock = ManualClock()
    top = TopAdapters(5, clock)
    labelled: set[str] = set()
    for wave in range(50):
        clock.advance(HALFLIFE_S)
        for number in range(wave, wave + 8):  # favourites come and go
            for _ in range(6):
                loser = top.asked(f"adapter-{number}")
                if loser is not None:
                    labelled.remove(loser)
                    assert top.label(loser) == OTHER
                if top.label(f"adapter-{number}") != OTHER:
                    labelled.add(f"adapter-{number}")
                assert labelled == top.labels
    assert "adapter-0" not in labelled and len(labelled) == 5


def test_the_most_asked_for_come_to_have_labels_though_others_came_first() -> None:
    top = TopAdapters(5, ManualClock())
    for number in range(5):
        top.asked(f"early-{number}")
    for _ in range(20):
        for number in range(5):
            top.asked(f"hot-{number}")
    assert top.labels == {f"hot-{number}" for number in range(5)}


def test_equals_do_not_take_each_others_labels_in_turns() -> None:
    top = TopAdapters(2, ManualClock())
    changes = 0
    before = top.labels
    for number in range(3000):
        top.asked(f"adapter-{number % 3}")
        changes += top.labels != before
        before = top.labels
    assert changes == 2  # the first two that came


def test_yesterdays_fame_fades() -> None:
    clock = ManualClock()
    top = TopAdapters(1, clock)
    for _ in range(1000):
        top.asked("old")
    clock.advance(20 * HALFLIFE_S)
    losers = [top.asked("new") for _ in range(6)]
    assert [loser for loser in losers if loser] == ["old"]
    assert (top.label("old"), top.label("new")) == (OTHER, "new")


def test_memory_is_bounded_and_owners_of_labels_are_kept() -> None:
    top = TopAdapters(3, ManualClock())
    for _ in range(9):
        for number in range(3):
            top.asked(f"hot-{number}")
    for number in range(50_000):
        assert top.asked(f"once-{number}") is None
    assert top.labels == {"hot-0", "hot-1", "hot-2"}
    assert len(top._recent) <= 5000
