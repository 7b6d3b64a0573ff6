"""Replicas that a router found dead or unreachable: it hears of that before any heartbeat is missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REMEMBERED_S = 10.0
"""By then the table has forgotten a dead one, and one that only could not be reached deserves another try."""


class LostReplicas:
    """One thread or event loop.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def add(self, replica_id: str) -> None:
        self._until_s[replica_id] = self._clock() + REMEMBERED_S

    def put_last(self, order: Sequence[str], avoided: str = "") -> list[str]:
        """The same replicas in the same order, but lost ones, and the `avoided` one, behind all others."""
        now_s = self._clock()
        self._until_s = {one: until_s for one, until_s in self._until_s.items() if until_s > now_s}
        return sorted(order, key=lambda one: one in self._until_s or one == avoided)
