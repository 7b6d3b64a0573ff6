"""The placement manager: what the cluster should look like, from what replicas, routers and the registry report.

Pure: no Ray, no threads, no I/O; time comes from the clock passed in. `cluster/actor.py` runs it. A manager that dies
is rebuilt from the registry and from the replicas' next heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from cluster.config import ClusterSettings
from cluster.placement import Placement, ReplicaSpace
from cluster.planner import PlacementPlanner, Reservation
from cluster.table import (
    AdapterFacts,
    AliasKey,
    DemandSample,
    PlacementTable,
    ReplicaLoad,
    ReplicaOrders,
    ReplicaReport,
    TableUpdate,
)
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class _Seen:
    report: ReplicaReport
    at_s: float


class PlacementManager:
    """Holds the placement table. Not thread-safe: one caller at a time.

    Args:
        settings: periods, bounds and shares.
        base_id: what users call the base model; copied into the table.
        first_epoch: above every epoch of a predecessor, e.g. milliseconds since 1970.
        clock: seconds; only differences matter.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        base_id: str,
        first_epoch: int,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._planner = PlacementPlanner(settings, clock)
        self._replicas: dict[str, _Seen] = {}
        self._leaving: frozenset[str] = frozenset()
        self._desired: Mapping[AliasKey, AdapterVersion] = {}
        self._facts: Mapping[AdapterVersion, AdapterFacts] = {}
        self._serving: dict[AliasKey, AdapterVersion] = {}
        self._table = PlacementTable(epoch=first_epoch, base_id=base_id)

    # -- what the world reports ------------------------------------------------------------------

    def heartbeat(self, report: ReplicaReport) -> ReplicaOrders:
        """Take one replica's report; answer what it should hold. A new replica gets its part of the plan at once.

        One that is leaving is to hold nothing more than its requests need.
        """
        if report.replica_id in self._leaving:
            return ReplicaOrders(self._table.epoch)
        before = self._replicas.get(report.replica_id)
        self._replicas[report.replica_id] = _Seen(report, self._clock())
        if before is None or before.report.rows != report.rows:
            self.tick()
        return self._orders(report.replica_id)

    def leave(self, replica_ids: Collection[str]) -> None:
        """Take all that are leaving now, in place of those named before: they finish their requests and get no more.

        They are nobody's home from this moment on. One that is no longer named is a replica like any other.
        """
        self._leaving = frozenset(replica_ids)
        gone = self._leaving & self._replicas.keys()
        for replica_id in gone:
            del self._replicas[replica_id]
        if gone:
            self.tick()

    def observe(self, demand: Mapping[AdapterVersion, DemandSample]) -> None:
        """Take one router's report of what it was asked for since its last one."""
        self._planner.observe(demand)

    def lose(self, replica_ids: Collection[str]) -> None:
        """Take a router's word that these are dead. One that is not comes back with its next heartbeat."""
        known = self._replicas.keys() & replica_ids
        for replica_id in known:
            del self._replicas[replica_id]
        if known:
            self.tick()

    def set_registry(
        self,
        desired: Mapping[AliasKey, AdapterVersion],
        facts: Mapping[AdapterVersion, AdapterFacts],
    ) -> PlacementTable:
        """Take the registry's word: where each alias should point, and the size of every version named there.

        A new alias serves at once, a deleted one no longer; a moved one after its new version is warm (see `tick`).
        """
        self._desired = dict(desired)
        self._facts = dict(facts)
        return self.tick()

    # -- what the world may ask ------------------------------------------------------------------

    def tick(self) -> PlacementTable:
        """Recompute the plan. The table returned has a new epoch only if something in it changed."""
        self.expire()
        self._follow_registry()
        self._plan()
        if self._promote_warm():
            # Who served until now is wanted no more, and its successor has its demand.
            self._plan()
        return self._publish()

    def expire(self) -> bool:
        """Forget replicas that missed their heartbeats. True if there were any."""
        silence_s = self._settings.heartbeat_s * self._settings.missed_heartbeats
        deadline_s = self._clock() - silence_s
        dead = [r for r, seen in self._replicas.items() if seen.at_s < deadline_s]
        for replica_id in dead:
            del self._replicas[replica_id]
        return bool(dead)

    def poll(self, known_epoch: int) -> TableUpdate:
        """What a reader that has `known_epoch` still needs. Dead replicas are gone from the answer."""
        if self.expire():
            self.tick()
        if known_epoch > self._table.epoch:  # a predecessor on a faster clock got further
            self._table = replace(self._table, epoch=known_epoch + 1)
        table = self.table()
        is_current = known_epoch == table.epoch
        return TableUpdate(
            table.epoch, None if is_current else table, table.replicas, table.residents
        )

    def table(self) -> PlacementTable:
        """The table of the present epoch, with work and residents as last reported."""
        residents: dict[AdapterVersion, tuple[str, ...]] = {}
        for replica_id, seen in sorted(self._replicas.items()):
            for version in seen.report.device:
                residents[version] = (*residents.get(version, ()), replica_id)
        loads = {replica_id: seen.report.load for replica_id, seen in self._replicas.items()}
        return replace(self._table, replicas=loads, residents=residents)

    def reports(self) -> tuple[ReplicaReport, ...]:
        """The last report of every live replica."""
        return tuple(seen.report for _, seen in sorted(self._replicas.items()))

    @property
    def placement(self) -> Placement:
        return self._planner.placement

    def check_integrity(self) -> None:
        """Raise AssertionError if the plan or the table contradicts what was reported."""
        rows: dict[str, int] = dict.fromkeys(self._replicas, 0)
        for version, holders in self.placement.holders.items():
            assert holders and len(set(holders)) == len(holders), (version, holders)
            for replica_id in holders:
                if replica_id in rows:
                    rows[replica_id] += self._facts[version].rows
        for replica_id, used in rows.items():
            capacity = self._replicas[replica_id].report.rows
            assert used <= capacity, f"{replica_id}: {used} rows planned of {capacity}"
        assert set(self._serving) == set(self._desired), (
            "an alias serves nothing, or a dead one does"
        )
        assert self._table.serving == self._serving
        assert self._table.holders == self.placement.holders

    # -- aliases ---------------------------------------------------------------------------------

    def _follow_registry(self) -> None:
        """New aliases serve; deleted ones do not; moved ones flip here unless someone holds what they serve."""
        serving = {}
        for key, desired in self._desired.items():
            current = self._serving.get(key, desired)
            serving[key] = current if self._is_held(current) else desired
        self._serving = serving

    def _is_held(self, version: AdapterVersion) -> bool:
        return version in self._facts and any(
            replica_id in self._replicas for replica_id in self.placement.holders.get(version, ())
        )

    def _moves(self) -> dict[AdapterVersion, AdapterVersion]:
        """Successor → predecessor, of all aliases on their way to a new version."""
        return {
            desired: self._serving[key]
            for key, desired in self._desired.items()
            if self._serving[key] != desired
        }

    def _promote_warm(self) -> bool:
        """Flip aliases to successors that all their holders have loaded, or that fit only in the old one's place."""
        ready = {
            new: old
            for new, old in self._moves().items()
            if self._is_warm(new) or new in self.placement.no_room
        }
        for key, desired in self._desired.items():
            if desired in ready:
                self._serving[key] = desired
        for new, old in ready.items():
            if old not in self._serving.values():
                ratio = self._facts[new].work_per_token / self._facts[old].work_per_token
                self._planner.inherit(old, new, ratio)
        return bool(ready)

    def _is_warm(self, version: AdapterVersion) -> bool:
        holders = self.placement.holders.get(version, ())
        return bool(holders) and all(version in self._replicas[r].report.device for r in holders)

    # -- the plan --------------------------------------------------------------------------------

    def _plan(self) -> None:
        spaces = [
            ReplicaSpace(replica_id, seen.report.rows, frozenset(seen.report.device))
            for replica_id, seen in self._replicas.items()
        ]
        successors = [Reservation(new, replaces=old) for new, old in self._moves().items()]
        self._planner.plan(spaces, self._facts, successors)

    def _orders(self, replica_id: str) -> ReplicaOrders:
        """What one replica should hold. Pins leave room for the largest adapter anybody may ask it for."""
        seen = self._replicas[replica_id]
        plan, device = self.placement, frozenset(seen.report.device)
        mine = [
            version
            for version in plan.by_replica.get(replica_id, ())
            if version in device or (version, replica_id) in plan.prefetch
        ]
        capacity = seen.report.rows
        sizes = (facts.rows for facts in self._facts.values() if facts.rows <= capacity)
        left = capacity - max(sizes, default=0)
        pinned = set()
        for version in mine:
            rows = self._facts[version].rows
            if rows <= left:
                left -= rows
                pinned.add(version)
        return ReplicaOrders(self._table.epoch, tuple(mine), frozenset(pinned))

    def _publish(self) -> PlacementTable:
        """The table, under a new epoch if it says anything new."""
        named = {*self._serving.values(), *self.placement.holders}
        fresh = replace(
            self._table,
            serving=dict(self._serving),
            holders=dict(self.placement.holders),
            facts={version: self._facts[version] for version in sorted(named)},
            replicas=dict.fromkeys(sorted(self._replicas), ReplicaLoad()),
        )
        if fresh != self._table:
            self._table = replace(fresh, epoch=self._table.epoch + 1)
        return self.table()
