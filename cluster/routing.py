"""In which order a request tries the replicas: a pure function of the table and of what this router did lately.

Holders that have the adapter on their device come first, the least busy in front; then replicas that happen to have it;
then holders still loading it, then the adapter's own rendezvous order, so an adapter nobody holds is loaded once and
not everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.rendezvous import preference
from cluster.table import PlacementTable
from storage.identity import AdapterVersion

MEMORY_S = 10.0
"""Time constant with which a router forgets the work it assigned; heartbeats report it by then."""


def routing_order(
    version: AdapterVersion | None,
    candidates: Collection[str],
    table: PlacementTable,
    assigned: Mapping[str, float],
) -> list[str]:
    """All candidates, the best first; never empty unless `candidates` is.

    Args:
        version: the request's adapter; None for the base model, which every replica has.
        candidates: replica ids that may be tried; the table may know fewer or more.
        assigned: work this router gave each replica lately, which no heartbeat has told the table yet.
    """

    def busy(replica_id: str) -> tuple[bool, float, str]:
        # One the table knows nothing of has just begun, or its engine has ended: it is no idle one.
        load = table.replicas.get(replica_id)
        work = (load.work if load else 0.0) + assigned.get(replica_id, 0.0)
        return load is None, work, replica_id

    if version is None:
        return sorted(candidates, key=busy)
    planned = [r for r in table.holders.get(version, ()) if r in candidates]
    resident = {r for r in table.residents.get(version, ()) if r in candidates}
    ready = sorted((r for r in planned if r in resident), key=busy)
    lucky = sorted(resident.difference(planned), key=busy)
    loading = [r for r in planned if r not in resident]
    first = [*ready, *lucky, *loading]
    return [*first, *preference(version, set(candidates).difference(first))]


@dataclass(slots=True)
class _Decayed:
    work: float
    at_s: float

    def now(self, now_s: float) -> float:
        return self.work * math.exp((self.at_s - now_s) / MEMORY_S)


class AssignedWork:
    """Work a router gave to each replica, fading over `MEMORY_S`. One thread or event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: dict[str, _Decayed] = {}

    def add(self, replica_id: str, work: float) -> None:
        """Also takes back what was added, with negative `work`."""
        now_s = self._clock()
        before = self._work.get(replica_id)
        total = (before.now(now_s) if before else 0.0) + work
        self._work[replica_id] = _Decayed(max(0.0, total), now_s)

    def by_replica(self, replica_ids: Collection[str]) -> dict[str, float]:
        """What is still remembered. Forgets replicas that are not in `replica_ids`."""
        now_s = self._clock()
        self._work = {r: kept for r, kept in self._work.items() if r in replica_ids}
        return {replica_id: kept.now(now_s) for replica_id, kept in self._work.items()}
