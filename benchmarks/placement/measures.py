"""What a run is judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.placement.simulation import Loss, Record
from benchmarks.placement.traces import Fleet, Floats, Span, Trace

USUAL_WINDOW_S = 30
TICK_S = 3
USUAL_RATIO = 1.5
"""A wait is normal again at this times its usual 95th percentile, or below a slot's time for a load."""
USUAL_LEAST_S = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. Rates are parts of one; what the plan did is per minute, as a part of all placements."""

    hit: float
    hit_of_best: float
    imbalance: float  # mean over windows of the busiest replica's slot time over the mean replica's
    worst_imbalance: float
    wait_p50_ms: float
    wait_p99_ms: float
    loads: float = 0.0
    crowd_ticks: float | None = None  # in which the crowd waited longer than usual
    recovery_s: float | None = (
        None  # from the loss of a replica until nobody waited longer than usual
    )


def judge(
    fleet: Fleet, trace: Trace, span: Span, record: Record, loss: Loss | None = None
) -> Outcome:
    """All requests that arrived after the warm-up and were started."""
    waits, replicas = np.array(record.wait_s), np.array(record.replica)
    started = replicas >= 0
    judged = started & (trace.times >= span.warmup_s)
    hit = float(np.array(record.is_hit)[judged].mean())
    best = float(trace.best[trace.times[judged].astype(int)].mean())
    busy_s = np.array(record.load_s) + trace.services
    imbalances = []
    for begin_s in range(span.warmup_s, span.duration_s - span.window_s + 1, span.window_s):
        began = trace.times + waits
        inside = started & (began >= begin_s) & (began < begin_s + span.window_s)
        load = np.bincount(replicas[inside], weights=busy_s[inside], minlength=fleet.replicas)
        imbalances.append(float(load.max() / load.mean()))
    minutes = (span.duration_s - span.warmup_s) / 60
    holders = [count for at_s, count in record.holders if at_s >= span.warmup_s]
    loads = sum(count for at_s, count in record.prefetches if at_s >= span.warmup_s)
    return Outcome(
        hit=hit,
        hit_of_best=hit / best,
        imbalance=float(np.mean(imbalances)),
        worst_imbalance=max(imbalances),
        wait_p50_ms=1000 * float(np.percentile(waits[judged], 50)),
        wait_p99_ms=1000 * float(np.percentile(waits[judged], 99)),
        loads=loads / minutes / float(np.mean(holders)) if holders else 0.0,
        crowd_ticks=_crowd_ticks(trace, span, waits),
        recovery_s=_recovery_s(trace, loss, waits) if loss else None,
    )


def _usual_s(trace: Trace, waits: Floats, until_s: float) -> float:
    before = (trace.times >= until_s - USUAL_WINDOW_S) & (trace.times < until_s)
    return max(USUAL_LEAST_S, USUAL_RATIO * float(np.percentile(waits[before], 95)))


def _crowd_ticks(trace: Trace, span: Span, waits: Floats) -> float | None:
    """Ticks after the crowd came up to the last in which it waited longer than usual."""
    if trace.crowd is None:
        return None
    usual_s, last = _usual_s(trace, waits, span.crowd_s), 0
    for tick in range((span.duration_s - span.crowd_s) // TICK_S):
        begin_s = span.crowd_s + tick * TICK_S
        inside = (trace.times >= begin_s) & (trace.times < begin_s + TICK_S)
        mine = inside & (trace.adapters == trace.crowd)
        if mine.any() and np.percentile(waits[mine], 95) > usual_s:
            last = tick + 1
    return float(last)


def _recovery_s(trace: Trace, loss: Loss, waits: Floats) -> float:
    """Seconds after the loss up to the last, before the replica is back, in which waits were longer than usual."""
    usual_s, last = _usual_s(trace, waits, loss.at_s), 0
    for second in range(math.ceil(loss.back_s - loss.at_s)):
        begin_s = loss.at_s + second
        inside = (trace.times >= begin_s) & (trace.times < begin_s + 1)
        if inside.any() and np.percentile(waits[inside], 95) > usual_s:
            last = second + 1
    return float(last)
