"""A replica in the simulation: slots, a queue, and a bank of rows that evicts as the real one does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.placement.traces import LOAD_S
from storage.identity import AdapterVersion
from workers.bank.eviction import readiness_to_leave

LOADS_AT_ONCE = 4


@dataclass(slots=True)
class Request:
    index: int
    version: AdapterVersion
    service_s: float
    arrived_s: float


@dataclass(slots=True)
class SimulatedReplica:
    """Times are handed in. `bank` maps an adapter to the moment it is ready.

    Who is the readiest `to_leave`, by its rows and the seconds it has been idle, makes room.
    """

    replica_id: str
    number: int
    slots: int
    rows: int
    ranks: Mapping[AdapterVersion, int]
    to_leave: Callable[[int, float], float] = readiness_to_leave
    is_alive: bool = True
    rows_used: int = 0
    bank: dict[AdapterVersion, float] = field(default_factory=dict)
    used_s: dict[AdapterVersion, float] = field(default_factory=dict)
    pinned: frozenset[AdapterVersion] = frozenset()
    queue: deque[Request] = field(default_factory=deque)
    running: dict[int, Request] = field(default_factory=dict)
    references: dict[AdapterVersion, int] = field(default_factory=dict)

    @property
    def num_ongoing(self) -> int:
        return len(self.running) + len(self.queue)

    def can_start(self, version: AdapterVersion, now_s: float) -> bool:
        """Whether a slot is free, and the adapter is here or can be loaded beside those in use and pinned.

        One that is being loaded is waited for in the queue, as in the engine's scheduler.
        """
        if len(self.running) >= self.slots:
            return False
        ready_s = self.bank.get(version)
        if ready_s is None:
            return self._has_room_for(self.ranks[version])
        return ready_s <= now_s

    def next_startable(self, now_s: float) -> Request | None:
        """The first of the queue that can start, taken out of it: who waits for rows lets others pass."""
        if len(self.running) >= self.slots:
            return None
        for place, request in enumerate(self.queue):
            if self.can_start(request.version, now_s):
                del self.queue[place]
                return request
        return None

    def start(self, request: Request, now_s: float) -> float:
        """Give the request a slot. Returns how long the slot waits for the adapter; 0 is a hit."""
        version = request.version
        self.running[request.index] = request
        self.references[version] = self.references.get(version, 0) + 1
        ready_s = self.bank.pop(version, None)
        if ready_s is None:
            self._make_room(self.ranks[version], now_s)
            ready_s = now_s + LOAD_S
        self.bank[version] = ready_s
        self.used_s[version] = now_s
        return max(0.0, ready_s - now_s)

    def finish(self, index: int) -> None:
        version = self.running.pop(index).version
        self.references[version] -= 1
        if not self.references[version]:
            del self.references[version]

    def obey(
        self, wanted: Iterable[AdapterVersion], pinned: frozenset[AdapterVersion], now_s: float
    ) -> int:
        """Pin, and load what is wanted and missing in the background, as far as it fits. Returns how many it loads."""
        self.pinned = pinned
        loads = 0
        for version in wanted:
            if version not in self.bank and self._has_room_for(self.ranks[version]):
                self._make_room(self.ranks[version], now_s)
                self.bank[version] = now_s + LOAD_S * (1 + loads // LOADS_AT_ONCE)
                self.used_s[version] = now_s
                loads += 1
        return loads

    def resident(self, now_s: float) -> tuple[AdapterVersion, ...]:
        return tuple(version for version, ready_s in self.bank.items() if ready_s <= now_s)

    def check_integrity(self) -> None:
        used = sum(self.ranks[version] for version in self.bank)
        assert used == self.rows_used <= self.rows, (used, self.rows_used, self.rows)
        assert len(self.running) <= self.slots
        assert all(version in self.bank for version in self.references)

    def _is_loose(self, version: AdapterVersion) -> bool:
        return version not in self.pinned and version not in self.references

    def _has_room_for(self, rows: int) -> bool:
        missing = self.rows_used + rows - self.rows
        if missing <= 0:
            return True
        for version in self.bank:
            if self._is_loose(version):
                missing -= self.ranks[version]
                if missing <= 0:
                    return True
        return False

    def _make_room(self, rows: int, now_s: float) -> None:
        while self.rows_used + rows > self.rows:
            loose = [version for version in self.bank if self._is_loose(version)]
            victim = max(loose, key=lambda v: self.to_leave(self.ranks[v], now_s - self.used_s[v]))
            del self.bank[victim]
            self.rows_used -= self.ranks[victim]
        self.rows_used += rows
