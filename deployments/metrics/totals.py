"""Counts of many replicas as one count that only grows, whichever of them come, go or begin anew. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from storage.figures import FigureKey, Figures, Histogram

_MAX_SOURCES = 1024


class Totals:
    """Adds up what each source counted since it was last asked. Not thread-safe.

    A source that leaves takes nothing with it. One that counts from zero again is believed from there on, and one that
    was away and comes back is not counted twice.
    """

    def __init__(self) -> None:
        self._last: OrderedDict[str, Figures] = OrderedDict()
        self._counters: dict[FigureKey, float] = {}
        self._histograms: dict[FigureKey, Histogram] = {}

    def take(self, readings: Mapping[str, Figures]) -> None:
        """The latest reading of each source that has one."""
        for source, figures in readings.items():
            before = self._last.get(source, Figures())
            self._add(before, figures)
            self._last[source] = figures
            self._last.move_to_end(source)
        while len(self._last) > _MAX_SOURCES:
            self._last.popitem(last=False)

    def read(self) -> Figures:
        return Figures(counters=dict(self._counters), histograms=dict(self._histograms))

    def _add(self, before: Figures, now: Figures) -> None:
        for key, value in now.counters.items():
            known = before.counters.get(key, 0.0)
            grown = value - known if value >= known else value
            self._counters[key] = self._counters.get(key, 0.0) + grown
        for key, histogram in now.histograms.items():
            grown_by = _since(before.histograms.get(key), histogram)
            total = self._histograms.get(key)
            is_first = total is None or total.bounds != grown_by.bounds
            self._histograms[key] = grown_by if is_first or total is None else total + grown_by


def _since(before: Histogram | None, now: Histogram) -> Histogram:
    """What was observed since `before`, or since the source began anew."""
    if before is None or before.bounds != now.bounds:
        return now
    grown = now - before
    return grown if min(grown.counts) >= 0 else now
