"""How much each adapter is asked for: exponentially weighted rates, slow to judge and quick to see a crowd.

A request that comes later weighs more, instead of all earlier ones being made lighter: a count is touched only by its
own requests, and ten thousand of them cost nothing while nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cluster.table import DemandSample
from storage.identity import AdapterVersion

SURGE_HALFLIFE_S = 6.0
SURGE_REQUESTS = 6.0
"""So many recent requests make a rise more than the noise of a Poisson process."""
SURGE_RATIO = 1.5
FORGOTTEN_REQUESTS = 0.01
"""A version whose decayed count falls below this is no longer tracked."""
_MOST_HALFLIVES = 300.0
"""Counts are scaled back before a request weighs 2 to the power of more than this."""


class DemandRate(NamedTuple):
    """Requests and rank-weighted tokens per second."""

    requests: float
    work: float


@dataclass(slots=True)
class _Count:
    """Requests and work, each at the weight of its moment."""

    requests: float = 0.0
    work: float = 0.0

    def add(self, requests: float, work: float) -> None:
        self.requests += requests
        self.work += work


class _Decay:
    """The weights of one half-life, and the counts that use them."""

    def __init__(self, halflife_s: float, now_s: float) -> None:
        self._halflife_s = halflife_s
        self._origin_s = self._started_s = now_s
        self.counts: dict[AdapterVersion, _Count] = {}

    def add(self, version: AdapterVersion, sample: DemandSample, now_s: float) -> None:
        weight = self.weight(now_s)
        count = self.counts.get(version)
        if count is None:
            self.counts[version] = count = _Count()
        count.add(weight * sample.requests, weight * sample.work)

    def weight(self, now_s: float) -> float:
        """What a request of this moment weighs: a count divided by it is a decayed number of requests."""
        halflives = (now_s - self._origin_s) / self._halflife_s
        if halflives > _MOST_HALFLIVES:
            for count in self.counts.values():
                count.requests *= math.exp2(-halflives)
                count.work *= math.exp2(-halflives)
            self._origin_s, halflives = now_s, 0.0
        return math.exp2(halflives)

    def observed_s(self, now_s: float) -> float:
        """The seconds a decayed count stands for. Less at first, so the first minutes are not underrated."""
        elapsed_s = max(1.0, now_s - self._started_s)
        return self._halflife_s / math.log(2) * (1 - math.exp2(-elapsed_s / self._halflife_s))


class DemandTracker:
    """Demand per version from routers' reports.

    The slow rate is the estimate; the fast one takes over while a rise is too large to be chance.
    """

    def __init__(self, halflife_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slow = _Decay(halflife_s, clock())
        self._fast = _Decay(SURGE_HALFLIFE_S, clock())

    def observe(self, samples: Mapping[AdapterVersion, DemandSample]) -> None:
        now_s = self._clock()
        for version, sample in samples.items():
            self._slow.add(version, sample, now_s)
            self._fast.add(version, sample, now_s)

    def rates(self) -> dict[AdapterVersion, DemandRate]:
        """The present rate of every version still asked for. Forgets those that are not."""
        now_s = self._clock()
        slow_scale, fast_scale = (d.weight(now_s) for d in (self._slow, self._fast))
        slow_s, fast_s = (d.observed_s(now_s) for d in (self._slow, self._fast))
        rates, forgotten = {}, []
        for version, slow in self._slow.counts.items():
            requests = slow.requests / slow_scale
            if requests < FORGOTTEN_REQUESTS:
                forgotten.append(version)
                continue
            usual = requests / slow_s
            recent = self._fast.counts[version].requests / fast_scale
            if recent >= SURGE_REQUESTS and recent > SURGE_RATIO * usual * fast_s:
                fast_work = self._fast.counts[version].work / fast_scale
                rates[version] = DemandRate(recent / fast_s, fast_work / fast_s)
            else:
                rates[version] = DemandRate(usual, slow.work / slow_scale / slow_s)
        for version in forgotten:
            del self._slow.counts[version], self._fast.counts[version]
        return rates

    def inherit(self, old: AdapterVersion, new: AdapterVersion, work_ratio: float) -> None:
        """A new version takes its predecessor's place: what was asked of `old` will be asked of `new`.

        Args:
            work_ratio: the new version's work per token over the old one's.
        """
        for decay in (self._slow, self._fast):
            before = decay.counts.pop(old, None)
            if before is not None:
                heir = decay.counts.setdefault(new, _Count())
                heir.add(before.requests, before.work * work_ratio)
