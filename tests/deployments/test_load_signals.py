"""Rates from an engine's counters: what waits, in seconds of work, and how often an adapter is not there."""

from __future__ import annotations

import pytest

from cluster.autoscaling import ReplicaSignals
from deployments.load_signals import SMOOTH_S, WINDOW_S, LoadSignals
from storage.figures import Figures, Histogram
from tests.cluster.clocks import ManualClock
from workers.engine.client import EngineLoad


def figures(work_done: float, busy_s: float) -> Figures:
    """Of an engine that has done so much in so long."""
    totals = {"flora_step_rank_rows": work_done, "flora_step_seconds": busy_s}
    return Figures(
        histograms={(name, ()): Histogram((1.0,), (1, 0), total) for name, total in totals.items()}
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def signals(clock: ManualClock) -> LoadSignals:
    return LoadSignals(clock)


def test_an_engine_that_has_done_nothing_has_no_load(signals: LoadSignals) -> None:
    assert signals.read(EngineLoad()) == ReplicaSignals()
    assert signals.read(EngineLoad(num_waiting=3, queued_work=100.0)).queue_s == 0.0


def test_what_waits_is_measured_by_what_the_engine_does_in_a_busy_second(
    signals: LoadSignals, clock: ManualClock
) -> None:
    signals.read(EngineLoad())
    clock.advance(10.0)
    busy = EngineLoad(queued_work=600.0, figures=figures(work_done=800.0, busy_s=4.0))
    assert signals.read(busy).queue_s == pytest.approx(3.0, rel=0.01)


def test_small_steps_do_not_make_the_engine_a_slow_one(
    signals: LoadSignals, clock: ManualClock
) -> None:
    signals.read(EngineLoad())
    clock.advance(1.0)
    signals.read(EngineLoad(figures=figures(work_done=200.0, busy_s=1.0)))
    clock.advance(2 * WINDOW_S)
    signals.read(EngineLoad(figures=figures(work_done=200.0, busy_s=1.0)))
    clock.advance(1.0)
    lone = EngineLoad(queued_work=100.0, figures=figures(work_done=210.0, busy_s=2.0))
    signals.read(lone)
    clock.advance(10 * SMOOTH_S)
    assert signals.read(lone).queue_s == pytest.approx(0.5, rel=0.2)


def test_misses_count_per_second_of_the_last_seconds_only(
    signals: LoadSignals, clock: ManualClock
) -> None:
    assert signals.read(EngineLoad(misses=1000)).misses_per_s == 0.0
    clock.advance(10.0)
    assert signals.read(EngineLoad(misses=1050)).misses_per_s == pytest.approx(5.0)
    for _ in range(3):
        clock.advance(WINDOW_S)
        last = signals.read(EngineLoad(misses=1050))
    assert last.misses_per_s == 0.0


@pytest.mark.parametrize(
    ("load", "used"),
    [
        (EngineLoad(num_running=2, kv_slots=8, kv_blocks_used=90, kv_blocks=100), 0.9),
        (EngineLoad(num_running=6, kv_slots=8, kv_blocks_used=10, kv_blocks=100), 0.75),
    ],
)
def test_room_in_use_is_of_what_is_scarcer(
    signals: LoadSignals, clock: ManualClock, load: EngineLoad, used: float
) -> None:
    signals.read(load)
    clock.advance(10 * SMOOTH_S)
    assert signals.read(load).kv_used == pytest.approx(used, rel=0.01)


def test_a_moment_between_two_short_answers_is_no_rest(
    signals: LoadSignals, clock: ManualClock
) -> None:
    for num_running in [8] * 40 + [0]:
        clock.advance(0.5)
        last = signals.read(EngineLoad(num_running=num_running, kv_slots=8))
    assert 0.7 < last.kv_used < 0.9
