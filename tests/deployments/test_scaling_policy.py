"""What Serve's controller and the placement manager say to each other, without ever waiting."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.scaling_policy import ANSWER_VALID_S, ASK_EVERY_S, TELL_EVERY_S, ManagerLink
from tests.cluster.clocks import ManualClock

DRAIN_S = 100.0


class Manager:
    """An actor's handle: what is asked is answered when `answer` is set."""

    def __init__(self) -> None:
        self.answer: bool | None = None
        self.is_there = True
        self.num_asked = 0
        self.told: list[set[str]] = []
        self.prepare_to_shrink = SimpleNamespace(remote=self._asked)
        self.leave = SimpleNamespace(remote=self._leave)

    def find(self) -> Any:
        if not self.is_there:
            raise ValueError("there is none")
        return self

    def _asked(self) -> object:
        self.num_asked += 1
        return object()

    def _leave(self, replica_ids: Sequence[str]) -> None:
        self.told.append(set(replica_ids))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def link(manager: Manager, clock: ManualClock) -> ManagerLink:
    return ManagerLink(manager.find, lambda asked: manager.answer, DRAIN_S, clock)


def wish(link: ManagerLink, clock: ManualClock, times: int = 10) -> bool:
    """Ten times a second, as the controller does; what is believed at the end."""
    for _ in range(times):
        clock.advance(0.1)
        link.prepare()
    return link.is_prepared


def test_a_replica_may_leave_when_the_manager_says_so(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    manager.answer = False
    assert not wish(link, clock)
    manager.answer = True
    assert wish(link, clock)


def test_an_answer_counts_for_moments_only(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    manager.answer = True
    assert wish(link, clock)
    clock.advance(ANSWER_VALID_S + 0.1)
    assert not link.is_prepared


def test_an_answer_that_nobody_collected_in_time_is_old_when_it_is(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    manager.answer = True
    link.prepare()
    clock.advance(3600)  # load came back: nobody should leave any more
    link.prepare()
    assert not link.is_prepared
    assert wish(link, clock), "it was asked again"


def test_the_wish_is_told_again_and_again_but_one_question_at_a_time(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    assert not wish(link, clock, times=100)
    assert manager.num_asked == 1, "the first is not answered yet"
    manager.answer = True
    wish(link, clock, times=100)
    assert manager.num_asked == pytest.approx(10 / ASK_EVERY_S, rel=0.2)


def test_without_a_manager_nobody_leaves_and_nothing_breaks(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    manager.is_there, manager.answer = False, True
    link.tell(["a"], ["b"])
    assert not wish(link, clock)
    manager.is_there = True
    clock.advance(TELL_EVERY_S)
    link.tell([], ["b"])
    assert manager.told == [{"a"}], "a manager that comes back hears of it"
    assert wish(link, clock)


def test_who_is_leaving_is_told_at_once_and_again_until_it_has_left(
    link: ManagerLink, manager: Manager, clock: ManualClock
) -> None:
    link.tell([], ["a", "b", "c"])
    assert manager.told == []
    link.tell(["c"], ["a", "b"])
    link.tell([], ["a", "b"])
    assert manager.told == [{"c"}]
    clock.advance(TELL_EVERY_S)
    link.tell([], ["a", "b"])
    assert manager.told == [{"c"}, {"c"}]
    link.tell(["b"], ["a"])
    assert manager.told[-1] == {"b", "c"}
    link.tell([], ["a", "b"])  # Serve keeps it after all
    assert manager.told[-1] == {"c"}
    clock.advance(DRAIN_S + 1)
    link.tell([], ["a", "b"])
    assert manager.told[-1] == set()
