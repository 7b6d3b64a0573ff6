"""Demand: bias-corrected from the first second, steady under noise, quick when a crowd comes."""

from __future__ import annotations

import pytest

from cluster.demand import DemandTracker
from cluster.table import DemandSample
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE, TWO = AdapterVersion("1" * 64), AdapterVersion("2" * 64)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def steady(tracker: DemandTracker, clock: ManualClock, seconds: int, requests: int = 2) -> None:
    for _ in range(seconds):
        clock.advance(1.0)
        tracker.observe({ONE: DemandSample(requests, requests * 50.0)})


@pytest.mark.parametrize("seconds", [2, 30, 600])
def test_a_steady_rate_is_found_however_short_the_history(clock: ManualClock, seconds: int) -> None:
    tracker = DemandTracker(120.0, clock)
    steady(tracker, clock, seconds)
    rate = tracker.rates()[ONE]
    assert rate.requests == pytest.approx(2.0, rel=0.1)
    assert rate.work == pytest.approx(100.0, rel=0.1)


def test_a_crowd_is_seen_within_seconds_and_a_single_request_is_no_crowd(
    clock: ManualClock,
) -> None:
    tracker = DemandTracker(120.0, clock)
    steady(tracker, clock, 600, requests=1)
    clock.advance(1.0)
    tracker.observe({ONE: DemandSample(100, 5000.0), TWO: DemandSample(1, 50.0)})
    rates = tracker.rates()
    assert rates[ONE].requests > 5.0
    assert rates[TWO].requests < 0.02


def test_demand_fades_by_half_in_a_half_life_and_is_forgotten_in_the_end(
    clock: ManualClock,
) -> None:
    tracker = DemandTracker(120.0, clock)
    steady(tracker, clock, 2000)
    before = tracker.rates()[ONE].requests
    clock.advance(120.0)
    assert tracker.rates()[ONE].requests == pytest.approx(before / 2, rel=0.01)
    clock.advance(7200.0)
    assert tracker.rates() == {}


def test_a_new_version_inherits_what_was_asked_of_the_old_one(clock: ManualClock) -> None:
    tracker = DemandTracker(120.0, clock)
    steady(tracker, clock, 100)
    before = tracker.rates()[ONE]
    tracker.inherit(ONE, TWO, work_ratio=3.0)
    after = tracker.rates()
    assert set(after) == {TWO}
    assert after[TWO].requests == pytest.approx(before.requests)
    assert after[TWO].work == pytest.approx(3.0 * before.work)
