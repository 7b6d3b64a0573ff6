"""What a process counts while it works: counters, gauges and histograms that cross processes and can be added up.

Knows nothing of Prometheus; what each name means to an operator is said in `deployments/metric_families.py`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

FigureKey = tuple[str, tuple[str, ...]]
"""A metric's name, and the values of its labels in the order the metric has them."""

SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0),
)
COUNTS = tuple(float(1 << power) for power in range(15))
"""Bounds of buckets: for durations, and for sizes from 1 to 16,384."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values fell into each bucket: `counts[i]` up to `bounds[i]`, the last above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # sum of the values

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: Histogram) -> Histogram:
        """Raises ValueError for other bounds."""
        self._check_bounds(other)
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.total + other.total)

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What was observed since `earlier`, an older reading of the same. Raises ValueError for other bounds."""
        self._check_bounds(earlier)
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - earlier.total)

    def quantile(self, share: float) -> float:
        """The value that `share` (0 to 1) of all do not exceed, spread evenly within its bucket; 0 without any.

        Above the highest bound nothing is known: the answer is that bound.
        """
        wanted, passed, lower = share * self.count, 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and passed + count >= wanted:
                return lower + (bound - lower) * max(0.0, wanted - passed) / count
            passed += count
            lower = bound
        return lower if passed < self.count else 0.0

    def _check_bounds(self, other: Histogram) -> None:
        if self.bounds != other.bounds:
            raise ValueError("histograms of different buckets cannot be added up")


@dataclass(frozen=True, slots=True)
class Figures:
    """One reading of a process's figures. Counters and histograms only grow while the process lives."""

    counters: Mapping[FigureKey, float] = field(default_factory=dict)
    gauges: Mapping[FigureKey, float] = field(default_factory=dict)
    histograms: Mapping[FigureKey, Histogram] = field(default_factory=dict)

    def merged(self, other: Figures) -> Figures:
        """Both together; of a key that both have, `other`'s value."""
        return Figures(
            {**self.counters, **other.counters},
            {**self.gauges, **other.gauges},
            {**self.histograms, **other.histograms},
        )


class FigureBook:
    """Counters and histograms being kept. Every method may be called from any thread, and takes a microsecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[FigureKey, float] = {}
        self._tallies: dict[FigureKey, _Tally] = {}

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        key = (name, labels)
        with self._lock:
            self._counters[key] = self._counters.get(key, 0.0) + by

    def fold(self, name: str, labels: tuple[str, ...], into: tuple[str, ...]) -> None:
        """Let a counter's series end, and add what it counted to another's: their sum stays as it was."""
        with self._lock:
            by = self._counters.pop((name, labels), 0.0)
            if by:
                self._counters[name, into] = self._counters.get((name, into), 0.0) + by

    def observe(
        self,
        name: str,
        value: float,
        *labels: str,
        bounds: tuple[float, ...] = SECONDS,
        times: int = 1,
    ) -> None:
        """Add a value to a histogram, `times` times. `bounds` matter the first time only."""
        key = (name, labels)
        with self._lock:
            tally = self._tallies.get(key)
            if tally is None:
                tally = self._tallies[key] = _Tally(bounds)
            tally.add(value, times)

    def read(self) -> Figures:
        with self._lock:
            histograms = {key: tally.read() for key, tally in self._tallies.items()}
            return Figures(counters=dict(self._counters), histograms=histograms)


class _Tally:
    """One histogram being filled."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def read(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)
