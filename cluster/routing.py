"""In which order a request tries the replicas: from the table, and from what this router did lately.

Holders that have the adapter on their device come first, the least busy in front; then replicas that happen to have it;
then holders still loading it, then the adapter's own rendezvous order, so an adapter nobody holds is loaded once and
not everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cluster.rendezvous import preference
from cluster.table import PlacementTable
from storage.identity import AdapterVersion

MAX_CHOICES = 10_000
MEMORY_S = 10.0
"""Time constant with which a router forgets the work it assigned; heartbeats report it by then."""


@dataclass(slots=True)
class _Decayed:
    work: float
    at_s: float

    def now(self, now_s: float) -> float:
        return self.work * math.exp((self.at_s - now_s) / MEMORY_S)


class Routing:
    """What one router knows beside the table: the work it assigned lately. One thread or event loop.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._assigned: dict[str, _Decayed] = {}
        self._choices: dict[str, tuple[str, float]] = {}  # request → replica, until it is settled

    def order(
        self,
        version: AdapterVersion | None,
        work: float,
        candidates: Collection[str],
        table: PlacementTable,
    ) -> list[str]:
        """All candidates, the best first; never empty unless `candidates` is. Changes nothing: see `choose`.

        Args:
            version: the request's adapter; None for the base model, which every replica has.
            work: its rank-weighted tokens.
            candidates: replica ids that may be tried; the table may know fewer or more.
        """
        now_s = self._clock()

        def busy(replica_id: str) -> tuple[bool, float, str]:
            # One the table knows nothing of has just begun, or its engine has ended: it is no idle one.
            load, mine = table.replicas.get(replica_id), self._assigned.get(replica_id)
            total = (load.work if load else 0.0) + (mine.now(now_s) if mine else 0.0)
            return load is None, total, replica_id

        if version is None:
            return sorted(candidates, key=busy)
        planned = [r for r in table.holders.get(version, ()) if r in candidates]
        resident = {r for r in table.residents.get(version, ()) if r in candidates}
        ready = sorted((r for r in planned if r in resident), key=busy)
        lucky = sorted(resident.difference(planned), key=busy)
        loading = [r for r in planned if r not in resident]
        first = [*ready, *lucky, *loading]
        return [*first, *preference(version, set(candidates).difference(first))]

    def choose(self, request_id: str, replica_id: str, work: float) -> None:
        """The request goes to this replica. Its work counts there, and no longer where it was to go before.

        At once, not when the replica has accepted: requests of the same moment must see each other.
        """
        self._take_back(request_id)
        self._add(replica_id, work)
        self._choices[request_id] = (replica_id, work)
        if len(self._choices) > MAX_CHOICES:  # given up before any replica accepted
            del self._choices[next(iter(self._choices))]

    def is_chosen(self, request_id: str) -> bool:
        """Whether the request is on its way to a replica that has not accepted it yet."""
        return request_id in self._choices

    def settle(self, request_id: str) -> None:
        """The replica chosen last has accepted the request; it will not move any more."""
        self._choices.pop(request_id, None)

    def give_up(self, request_id: str) -> None:
        """The request goes nowhere."""
        self._take_back(request_id)
        self._choices.pop(request_id, None)

    def _take_back(self, request_id: str) -> None:
        if request_id in self._choices:
            replica_id, work = self._choices[request_id]
            self._add(replica_id, -work)

    def _add(self, replica_id: str, work: float) -> None:
        now_s = self._clock()
        before = self._assigned.get(replica_id)
        total = (before.now(now_s) if before else 0.0) + work
        self._assigned[replica_id] = _Decayed(max(0.0, total), now_s)
