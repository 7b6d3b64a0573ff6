"""What precedes a scale-down: second copies of all that has holders, so that a replica may go and nothing goes with it.

Serve does not say which replica it will take. So whoever wants one fewer asks for a while, and until all is twice where
it is wanted, or that has taken too long, is told to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from storage.identity import AdapterVersion

SHRINK_LEASE_S = 10.0
"""How long second copies are kept after the last word that a replica may have to go."""
SHRINK_WAIT_S = 120.0
"""After so long a replica may go though second copies are missing, as where disks are too small for them."""


class Shrinking:
    """Not thread-safe: one caller at a time.

    Args:
        tick_s: between plans; a wish outlasts a few of them.
        clock: seconds; only differences matter.
    """

    def __init__(self, tick_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = max(SHRINK_LEASE_S, 3 * tick_s)
        self._clock = clock
        self._since_s = self._until_s = clock()
        self._missing: Mapping[str, tuple[AdapterVersion, ...]] | None = None

    @property
    def is_wanted(self) -> bool:
        return self._clock() < self._until_s

    @property
    def is_ready(self) -> bool:
        """It is wanted, and no copy is missing, or missing ones were waited for long enough."""
        if not self.is_wanted:
            return False
        return self._missing == {} or self._clock() - self._since_s >= SHRINK_WAIT_S

    def want(self) -> bool:
        """For a lease from now. True when it was not wanted before, so a plan should follow."""
        is_new = not self.is_wanted
        if is_new:
            self._since_s = self._clock()
        self._until_s = self._clock() + self._lease_s
        return is_new

    def begin_again(self) -> None:
        """A replica goes now; the next one has the whole wait before it."""
        self._since_s = self._clock()

    def set_missing(self, missing: Mapping[str, tuple[AdapterVersion, ...]] | None) -> None:
        """What each replica should bring near by the newest plan; None when that was made with no wish to shrink."""
        self._missing = missing

    def missing_at(self, replica_id: str) -> tuple[AdapterVersion, ...]:
        return (self._missing or {}).get(replica_id, ())
