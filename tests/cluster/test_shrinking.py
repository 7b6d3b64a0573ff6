"""A replica may go when nothing would go with it, and in the end though something would."""

from __future__ import annotations

from cluster.shrinking import SHRINK_LEASE_S, SHRINK_WAIT_S, Shrinking
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE = AdapterVersion("1" * 64)


def test_it_is_ready_once_a_plan_made_for_it_misses_nothing() -> None:
    shrinking = Shrinking(1.0, ManualClock())
    assert shrinking.want() and not shrinking.is_ready, "no plan was made for it"
    shrinking.set_missing({"a": (ONE,)})
    assert shrinking.missing_at("a") == (ONE,) and shrinking.missing_at("b") == ()
    assert not shrinking.is_ready
    shrinking.set_missing({})
    assert shrinking.is_ready


def test_a_wish_lasts_for_its_lease_and_longer_plans_make_longer_leases() -> None:
    for tick_s, lease_s in ((1.0, SHRINK_LEASE_S), (SHRINK_LEASE_S, 3 * SHRINK_LEASE_S)):
        clock = ManualClock()
        shrinking = Shrinking(tick_s, clock)
        assert shrinking.want() and not shrinking.want()
        shrinking.set_missing({})
        clock.advance(lease_s - 0.1)
        assert shrinking.is_ready
        clock.advance(0.1)
        assert not shrinking.is_wanted and not shrinking.is_ready


def test_missing_copies_are_waited_for_anew_for_each_replica_that_goes() -> None:
    clock = ManualClock()
    shrinking = Shrinking(1.0, clock)
    shrinking.set_missing({"a": (ONE,)})
    for _ in range(2):
        for _ in range(int(SHRINK_WAIT_S)):
            shrinking.want()
            assert not shrinking.is_ready
            clock.advance(1.0)
        shrinking.want()
        assert shrinking.is_ready
        shrinking.begin_again()
