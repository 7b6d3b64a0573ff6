"""How much each adapter is asked for: exponentially weighted rates, slow to judge and quick to see a crowd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.table import DemandSample
from storage.identity import AdapterVersion

SURGE_HALFLIFE_S = 6.0
SURGE_REQUESTS = 6.0
"""So many recent requests make a rise more than the noise of a Poisson process."""
SURGE_RATIO = 1.5
FORGOTTEN_REQUESTS = 0.01
"""A version whose decayed count falls below this is no longer tracked."""


@dataclass(frozen=True, slots=True)
class DemandRate:
    """Requests and rank-weighted tokens per second."""

    requests: float
    work: float


@dataclass(slots=True)
class _Count:
    """A count that halves every half-life."""

    halflife_s: float
    requests: float = 0.0
    work: float = 0.0

    def decay(self, elapsed_s: float) -> None:
        factor = 0.5 ** (elapsed_s / self.halflife_s)
        self.requests *= factor
        self.work *= factor

    def add(self, requests: float, work: float) -> None:
        self.requests += requests
        self.work += work

    def rate(self, observed_s: float) -> DemandRate:
        """Counts per second. Divided by the weight observed so far, so the first minutes are not underrated."""
        weight_s = self.halflife_s / math.log(2) * (1 - 0.5 ** (observed_s / self.halflife_s))
        return DemandRate(self.requests / weight_s, self.work / weight_s)


@dataclass(slots=True)
class _Tracked:
    slow: _Count
    fast: _Count
    decayed_s: float

    def decay_to(self, now_s: float) -> None:
        for count in (self.slow, self.fast):
            count.decay(now_s - self.decayed_s)
        self.decayed_s = now_s


class DemandTracker:
    """Demand per version from routers' reports.

    The slow rate is the estimate; the fast one takes over while a rise is too large to be chance.
    """

    def __init__(self, halflife_s: float, clock: Callable[[], float]) -> None:
        self._halflife_s = halflife_s
        self._clock = clock
        self._started_s = clock()
        self._tracked: dict[AdapterVersion, _Tracked] = {}

    def observe(self, samples: Mapping[AdapterVersion, DemandSample]) -> None:
        for version, sample in samples.items():
            tracked = self._current(version)
            for count in (tracked.slow, tracked.fast):
                count.add(sample.requests, sample.work)

    def rates(self) -> dict[AdapterVersion, DemandRate]:
        """The present rate of every version still asked for. Forgets those that are not."""
        now_s = self._clock()
        observed_s = max(1.0, now_s - self._started_s)
        rates = {}
        for version, tracked in list(self._tracked.items()):
            tracked.decay_to(now_s)
            if tracked.slow.requests < FORGOTTEN_REQUESTS:
                del self._tracked[version]
                continue
            slow, fast = tracked.slow.rate(observed_s), tracked.fast.rate(observed_s)
            is_surge = (
                tracked.fast.requests >= SURGE_REQUESTS
                and fast.requests > SURGE_RATIO * slow.requests
            )
            rates[version] = fast if is_surge else slow
        return rates

    def inherit(self, old: AdapterVersion, new: AdapterVersion, work_ratio: float) -> None:
        """A new version takes its predecessor's place: what was asked of `old` will be asked of `new`.

        Args:
            work_ratio: the new version's work per token over the old one's.
        """
        if old not in self._tracked:
            return
        heir = self._current(new)
        before = self._current(old)
        for mine, theirs in ((heir.slow, before.slow), (heir.fast, before.fast)):
            mine.add(theirs.requests, theirs.work * work_ratio)
        del self._tracked[old]

    def _current(self, version: AdapterVersion) -> _Tracked:
        now_s = self._clock()
        tracked = self._tracked.get(version)
        if tracked is None:
            tracked = _Tracked(_Count(self._halflife_s), _Count(SURGE_HALFLIFE_S), now_s)
            self._tracked[version] = tracked
        tracked.decay_to(now_s)
        return tracked
