"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text is let through as soon as it cannot be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._num_exempt = 0  # characters at the beginning of the held text that may not end it
        self.found = False

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that may be shown now. Once `found`, everything before the stop string has been returned.

        Args:
            may_end: false where a stop string that ends in this text counts for nothing. One that only begins there
                counts once it is complete.
        """
        self._held += text
        if not may_end:
            self._num_exempt = len(self._held)
        starts = [at for stop in self._stops if (at := self._find(stop)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._num_unsure())

    def flush(self) -> str:
        """The rest, when no more text comes."""
        return self._release(len(self._held))

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._num_exempt - len(stop) + 1))

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self._num_exempt = max(0, self._num_exempt - count)
        if self.found:
            self._held = ""
        return shown

    def _num_unsure(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
