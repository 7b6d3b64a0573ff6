"""Replicas that fail what they are asked: they are given pauses, and one request after each to show that they are well.

A replica that fails at once is always the least busy, so whoever only looks at load sends it everything. This is a
circuit breaker (M. Nygard, *Release It!*) for each replica, which looks at what became of requests and not at load.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Pauses double until they are so long; by then Serve has long asked the replica for its health."""
FORGOTTEN_S = 60.0
"""A replica that has failed nothing for so long after a pause begins again with the first."""


class Outcome(StrEnum):
    """What became of a request at a replica. One that failed by its own fault, or was given up, says nothing."""

    BEGUN = "begun"  # there are first tokens
    ANSWERED = "answered"
    FAILED = "failed"


@dataclass(slots=True)
class _Failing:
    pause_s: float
    until_s: float  # the pause's end, or when answers began again
    is_tried: bool = False  # one request is there, to see whether it is well
    has_begun: bool = False  # an answer, since its last failure


class FailingReplicas:
    """One thread or event loop.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failing: dict[str, _Failing] = {}

    def hear(self, replica_id: str, outcome: Outcome) -> None:
        """A failure begins a pause; an answer that begins ends it, and one that ends well makes the next a short one.

        Requests that were sent before a pause began may fail in it: they make it no longer.
        """
        failing = self._failing.get(replica_id)
        if outcome is Outcome.FAILED:
            self._fail(replica_id, failing)
        elif failing is not None and outcome is Outcome.ANSWERED:
            del self._failing[replica_id]
        elif failing is not None:
            failing.until_s, failing.has_begun = self._clock(), True

    def send(self, replica_id: str) -> None:
        """A request goes there. The first after a pause is alone for as long again, unless there is word of it."""
        failing = self._failing.get(replica_id)
        if failing is not None and not failing.has_begun and self._clock() >= failing.until_s:
            failing.until_s = self._clock() + failing.pause_s
            failing.is_tried = True

    def sound(self, candidates: Collection[str]) -> Collection[str]:
        """The candidates that are not in a pause; all of them, if all are."""
        if not self._failing:
            return candidates
        now_s = self._clock()
        self._failing = {
            replica_id: failing
            for replica_id, failing in self._failing.items()
            if now_s < failing.until_s + FORGOTTEN_S
        }
        paused = {one for one, failing in self._failing.items() if now_s < failing.until_s}
        return frozenset(candidates) - paused or candidates

    def is_failing(self, replica_id: str) -> bool:
        """It has failed a request, and begun no answer since."""
        failing = self._failing.get(replica_id)
        return failing is not None and not failing.has_begun

    def _fail(self, replica_id: str, failing: _Failing | None) -> None:
        now_s = self._clock()
        if failing is None:
            self._failing[replica_id] = _Failing(FIRST_PAUSE_S, now_s + FIRST_PAUSE_S)
        elif failing.is_tried or now_s >= failing.until_s:
            pause_s = min(2 * failing.pause_s, LONGEST_PAUSE_S)
            self._failing[replica_id] = _Failing(pause_s, now_s + pause_s)
