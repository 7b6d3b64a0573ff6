"""How long loads take: a recent average for routers, histograms for whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import FailedVersion
from storage.figures import FigureBook, Figures
from storage.load_stages import Stage

_WEIGHT = 0.2
"""Of the latest load in the average."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of loads, since start."""

    num_errors: int
    failed: tuple[FailedVersion, ...]  # versions that exist and cannot be served here
    load_s: float  # see `LoadTimes.average_s`
    figures: Figures


class LoadTimes:
    """Seconds. Not thread-safe but for `read`."""

    def __init__(self) -> None:
        self.average_s = 0.0
        """From a request for a load to its rows being on the device, lately; 0 before the first."""
        self._book = FigureBook()

    def went_through(self, stage_s: Mapping[Stage, float]) -> None:
        """A load took so long in these stages."""
        for stage, seconds in stage_s.items():
            self._book.observe("flora_adapter_load_stage_seconds", seconds, stage)

    def loaded(self, tier: str, seconds: float, *, is_requested: bool) -> None:
        """An adapter found in `tier` is on the device, so long after it was asked for."""
        self._book.observe("flora_adapter_load_seconds", seconds, tier)
        if is_requested:  # what nobody waits for may take its time
            before_s = self.average_s or seconds
            self.average_s = before_s + _WEIGHT * (seconds - before_s)

    def read(self) -> Figures:
        return self._book.read()
