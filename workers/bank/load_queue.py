"""Which loads of adapters are under way, and which is next. Plain data; the loader's lock guards it.

There are two lanes, each with threads of its own: a load begins in the near one, visits the far one when the adapter
is neither in memory nor on disk, and ends in the near one. So a registry that does not answer holds up nobody whose
adapter is near, and no more threads than one lane has write to the device, however many wait for the registry.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum

from storage.identity import AdapterVersion
from workers.bank.source import FetchedAdapter


class Urgency(IntEnum):
    REQUESTED = 0  # a request waits for it
    WANTED = 1  # it should be on the device
    KEPT = 2  # it should be near, and no more


class Lane(IntEnum):
    NEAR = 0
    FAR = 1


@dataclass(slots=True, eq=False)
class Load:
    """One version's way to the device, or only near it. Times are on the loader's clock."""

    version: AdapterVersion
    urgency: Urgency
    asked_s: float
    queued_s: float = 0.0  # since when it waits for a thread
    queue_s: float = 0.0  # how long it has waited for one, in all
    lane: Lane = Lane.NEAR
    fetched: FetchedAdapter | None = None
    is_busy: bool = False  # the bank had no room at the last attempt
    is_parked: bool = False  # … and nothing was freed since


class LoadQueue:
    """See the module's docstring. A load is in here from `add` to `remove`; it waits, is parked, or a thread has it."""

    def __init__(self) -> None:
        self._loads: dict[AdapterVersion, Load] = {}
        self._waiting = {(lane, urgency): deque[Load]() for lane in Lane for urgency in Urgency}

    def __contains__(self, version: AdapterVersion) -> bool:
        return version in self._loads

    def find(self, version: AdapterVersion) -> Load | None:
        return self._loads.get(version)

    def add(self, load: Load, now: float) -> None:
        """Behind all of its urgency. One that a thread had, or that was parked, waits again."""
        self._loads[load.version] = load
        load.is_parked = False
        load.queued_s = now
        self._waiting[load.lane, load.urgency].append(load)

    def hurry(self, load: Load, now: float) -> None:
        """A request waits for it from now on; no effect if one did already."""
        if load.urgency is Urgency.REQUESTED:
            return
        waiting = self._waiting[load.lane, load.urgency]
        load.urgency, load.asked_s = Urgency.REQUESTED, now
        if load in waiting:
            waiting.remove(load)
            self.add(load, now)

    def pop(self, lane: Lane, now: float) -> Load | None:
        """The most urgent that waits, the oldest of several; None when none does."""
        for urgency in Urgency:
            if self._waiting[lane, urgency]:
                load = self._waiting[lane, urgency].popleft()
                load.queue_s += now - load.queued_s
                return load
        return None

    def has_waiting(self, lane: Lane) -> bool:
        return any(self._waiting[lane, urgency] for urgency in Urgency)

    def unpark(self, now: float) -> None:
        """Let all that were parked wait again."""
        for load in self._loads.values():
            if load.is_parked:
                self.add(load, now)

    def remove(self, load: Load) -> None:
        """It is over. No thread may wait for it."""
        del self._loads[load.version]

    def drop_wishes(self) -> None:
        """Forget all that wait and that no request waits for."""
        for (_, urgency), waiting in self._waiting.items():
            if urgency is not Urgency.REQUESTED:
                for load in waiting:
                    self.remove(load)
                waiting.clear()
