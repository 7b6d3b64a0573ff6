"""What an engine's readings say of its replica's load: rates from its counters, over the last seconds. No Ray."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.autoscaling import ReplicaSignals
from workers.engine.client import EngineLoad

WINDOW_S = 15.0
"""Rates are taken over so long."""
SMOOTH_S = 2.0
"""Time constant with which the moment's room and queue are smoothed: answers are short, and readings far between."""
PACE_HALFLIFE_S = 300.0
"""How fast it is forgotten what the engine can do when it has much to do."""


@dataclass(frozen=True, slots=True)
class _Reading:
    at_s: float
    work_done: float  # rank-weighted tokens computed
    busy_s: float  # spent in steps
    misses: int


class LoadSignals:
    """Told one reading after another of the same engine.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._readings: deque[_Reading] = deque()
        self._pace = 0.0
        self._queue_s = 0.0
        self._kv_used = 0.0

    def read(self, load: EngineLoad) -> ReplicaSignals:
        """Signals of this moment. Before the engine has computed anything, what waits takes no known time: 0."""
        now = _Reading(
            self._clock(),
            work_done=_total(load, "flora_step_rank_rows"),
            busy_s=_total(load, "flora_step_seconds"),
            misses=load.misses,
        )
        last_s = self._readings[-1].at_s if self._readings else now.at_s
        while len(self._readings) > 1 and self._readings[1].at_s <= now.at_s - WINDOW_S:
            self._readings.popleft()
        self._readings.append(now)
        before = self._readings[0]
        self._pace *= 0.5 ** ((now.at_s - last_s) / PACE_HALFLIFE_S)
        if now.busy_s > before.busy_s:
            # Full steps do more work per second than small ones: the best of late is what it can do.
            pace = (now.work_done - before.work_done) / (now.busy_s - before.busy_s)
            self._pace = max(self._pace, pace)
        keep = math.exp((last_s - now.at_s) / SMOOTH_S)
        queue_s = load.queued_work / self._pace if self._pace else 0.0
        slots_used = load.num_running / load.kv_slots if load.kv_slots else 0.0
        self._queue_s = queue_s + keep * (self._queue_s - queue_s)
        kv_used = max(load.kv_used, slots_used)
        self._kv_used = kv_used + keep * (self._kv_used - kv_used)
        elapsed_s = now.at_s - before.at_s
        return ReplicaSignals(
            queue_s=self._queue_s,
            kv_used=self._kv_used,
            misses_per_s=(now.misses - before.misses) / elapsed_s if elapsed_s > 0 else 0.0,
            first_token_p99_s=load.first_token_p99_s,
        )


def _total(load: EngineLoad, name: str) -> float:
    histogram = load.figures.histograms.get((name, ()))
    return histogram.total if histogram else 0.0
