"""Work is shared out by what it costs, and again when somebody would wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from training.sharing import share_again, share_out

COSTS = st.dictionaries(st.sampled_from("abcdefghij"), st.floats(0.1, 100.0), max_size=10)


def test_the_longest_go_first_each_to_whom_has_least() -> None:
    costs = {"a": 10.0, "b": 9.0, "c": 6.0, "d": 5.0, "e": 4.0}
    assert share_out(costs, 2) == (("a", "d", "e"), ("b", "c"))
    assert share_out({"a": 1.0}, 3) == (("a",), (), ())


@given(COSTS, st.integers(1, 5))
def test_every_adapter_has_one_worker_and_none_has_far_more_than_another(
    costs: dict[str, float], workers: int
) -> None:
    shares = share_out(costs, workers)
    assert len(shares) == workers
    assert sorted(name for share in shares for name in share) == sorted(costs)
    load = [sum(costs[name] for name in share) for share in shares]
    assert max(load) - min(load) <= max(costs.values(), default=0.0) + 1e-9


def test_shares_stay_while_they_are_balanced() -> None:
    shares = (("a", "c"), ("b",))
    assert share_again(shares, {"a": 5.0, "b": 10.0, "c": 6.0}, 2) == shares
    assert share_again(shares, {"a": 5.0, "b": 4.0}, 2) == shares, "c is over; nobody is idle"


def test_who_would_run_dry_takes_over_from_the_others() -> None:
    shares = (("a", "b", "c"), ("d",))
    assert share_again(shares, {"a": 2.0, "b": 2.0, "c": 1.0}, 2) == (("a", "c"), ("b",))
    assert share_again(shares, {"a": 2.0}, 2) == shares, "one adapter cannot be divided"


def test_another_number_of_workers_is_another_plan() -> None:
    costs = {"a": 3.0, "b": 2.0}
    assert share_again((), costs, 2) == (("a",), ("b",))
    assert share_again((("a",), ("b",)), costs, 1) == (("a", "b"),)
    assert share_again((("a",), ("b",)), {"b": 2.0}, 3) == (("b",), (), ())
