"""Which adapters have a label of their own: the most asked for, and never more than a few. The others are `other`.

Pure: time comes from the clock passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

OTHER = "other"
HALFLIFE_S = 600.0
TAKES_OVER_RATIO = 2.0
"""So many times as often must a newcomer be asked for lately as the least wanted label's owner, to take its place."""
TAKES_OVER_REQUESTS = 5.0
"""… and so often at least: one request is no popularity."""
_MAX_TRACKED = 4096


@dataclass(slots=True)
class _Recent:
    """Requests, half as many of them for each half-life that has passed."""

    requests: float
    at_s: float

    def now(self, now_s: float) -> float:
        return self.requests * math.exp2((self.at_s - now_s) / HALFLIFE_S)


class TopAdapters:
    """Gives labels, and takes them back when others are wanted more.

    Args:
        limit: labels besides `other`.
        clock: seconds; only differences matter.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._recent: dict[str, _Recent] = {}
        self._labels: set[str] = set()

    @property
    def labels(self) -> frozenset[str]:
        """Adapters that have a label now."""
        return frozenset(self._labels)

    def asked(self, adapter: str) -> str | None:
        """Count a request for an adapter, which may give it a label.

        Returns:
            The adapter that lost its label to this one, if one did: what was counted under it is `other`'s now.
        """
        now_s = self._clock()
        recent = self._recent.get(adapter)
        requests = (recent.now(now_s) if recent else 0.0) + 1.0
        self._recent[adapter] = _Recent(requests, now_s)
        if len(self._recent) > _MAX_TRACKED:
            self._forget(now_s)
        if adapter in self._labels:
            return None
        if len(self._labels) < self._limit:
            self._labels.add(adapter)
            return None
        least = min(self._labels, key=lambda one: self._recent[one].now(now_s))
        needed = max(TAKES_OVER_REQUESTS, TAKES_OVER_RATIO * self._recent[least].now(now_s))
        if requests < needed:
            return None
        self._labels.remove(least)
        self._labels.add(adapter)
        return least

    def label(self, adapter: str) -> str:
        """Under which label an adapter counts now."""
        return adapter if adapter in self._labels else OTHER

    def _forget(self, now_s: float) -> None:
        """Drop the less wanted half; owners of labels stay."""
        by_want = sorted(self._recent, key=lambda one: self._recent[one].now(now_s), reverse=True)
        kept = {*by_want[: _MAX_TRACKED // 2], *self._labels}
        self._recent = {one: recent for one, recent in self._recent.items() if one in kept}
