"""Who works at a desk when several could: one leader at a time, by a record in the store that runs out.

Clocks of several machines may differ, and a leader may be cut off in the middle of its work. So the lease only keeps
two desks from doing the same work twice over; what must not go wrong rests on compare-and-swap of the records.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from storage.object_store import ObjectStore
from storage.records import swap

LEASE_S = 15.0
_RENEWED_BEFORE_END_S = 10.0


class _Held(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    holder: str
    ends_s: float = Field(description="Seconds since the epoch.")


class Lease:
    """One holder's view of one lease.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(
        self, store: ObjectStore, key: str, holder: str, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._key = key
        self._holder = holder
        self._clock = clock
        self._ends_s = 0.0  # of our own term

    def is_held(self) -> bool:
        """Whether the lease is this holder's for some seconds from now: takes it, or prolongs it, where possible."""
        now_s = self._clock()
        if now_s < self._ends_s - _RENEWED_BEFORE_END_S:
            return True

        def take(current: _Held | None) -> _Held | None:
            if current is not None and current.holder != self._holder and now_s < current.ends_s:
                return None
            return _Held(holder=self._holder, ends_s=now_s + LEASE_S)

        held = swap(self._store, self._key, _Held, take)
        is_ours = held is not None and held.holder == self._holder
        self._ends_s = now_s + LEASE_S if is_ours else 0.0
        return is_ours

    def give_back(self) -> None:
        """Let the next one take it at once."""

        def end(current: _Held | None) -> _Held | None:
            is_ours = current is not None and current.holder == self._holder
            return _Held(holder=self._holder, ends_s=0.0) if is_ours else None

        swap(self._store, self._key, _Held, end)
        self._ends_s = 0.0
