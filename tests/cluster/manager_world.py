"""A placement manager with replicas that do as they are told, on a clock that moves when told."""

from __future__ import annotations

from typing import Any

from cluster.config import ClusterSettings
from cluster.manager import PlacementManager
from cluster.registry_word import RegistryWord
from cluster.table import AdapterFacts, AliasKey, DemandSample, PlacementTable, ReplicaReport
from storage.errors import FailedVersion
from storage.identity import AdapterVersion, sha256_hex
from tests.cluster.clocks import ManualClock

KEY: AliasKey = ("default", "poet", "latest")
PROD: AliasKey = ("default", "poet", "prod")
SETTLING_S = 2.0


def version(index: int) -> AdapterVersion:
    return AdapterVersion(sha256_hex(f"adapter {index}".encode()))


def facts(*indices: int, rows: int = 4) -> dict[AdapterVersion, AdapterFacts]:
    return {version(index): AdapterFacts(rows=rows, num_bytes=100) for index in indices}


def corrupt(index: int) -> FailedVersion:
    return FailedVersion(version(index), "adapter_corrupt", "a file has other bytes")


def refused(index: int) -> FailedVersion:
    return FailedVersion(version(index), "adapter_refused", "a tensor has a wrong shape")


def report(replica_id: str, *device: AdapterVersion, rows: int = 16, **told: Any) -> ReplicaReport:
    return ReplicaReport(replica_id, rows=rows, num_bytes=1000, device=device, **told)


class Replica:
    """Holds what it is told to, but for what it cannot load."""

    def __init__(self, rows: int = 16) -> None:
        self.rows = rows
        self.device: set[AdapterVersion] = set()
        self.disk: set[AdapterVersion] = set()
        self.in_use: set[AdapterVersion] = set()  # by long requests
        self.broken: dict[AdapterVersion, FailedVersion] = {}
        self.failed: dict[AdapterVersion, FailedVersion] = {}
        self.obeys = True

    def report(self, replica_id: str) -> ReplicaReport:
        return report(
            replica_id,
            *sorted(self.device),
            rows=self.rows,
            disk=tuple(sorted(self.disk)),
            failed=tuple(self.failed.values()),
        )

    def ask(self, wanted: AdapterVersion) -> None:
        """A request comes for it, and loads it."""
        if wanted in self.broken:
            self.failed[wanted] = self.broken[wanted]
        else:
            self.device.add(wanted)
            self.disk.add(wanted)


class Cluster:
    """`beat` lets time pass for all of it."""

    def __init__(self, *replica_ids: str, rows: int = 16, **settings: Any) -> None:
        self.clock = ManualClock()
        self.settings = ClusterSettings(**settings)
        self.replicas: dict[str, Replica] = {}
        self.manager = self._manager(1)
        self.clock.advance(SETTLING_S)
        self.add(*replica_ids, rows=rows)

    def _manager(self, first_epoch: int) -> PlacementManager:
        return PlacementManager(self.settings, "base", first_epoch, self.clock)

    def restart(self) -> None:
        """The manager dies; another takes its place and knows nothing."""
        self.manager = self._manager(self.manager.table().epoch + 1000)

    def add(self, *replica_ids: str, rows: int = 16) -> None:
        for replica_id in replica_ids:
            self.replicas[replica_id] = Replica(rows)
        self.beat()

    def publish(
        self,
        desired: dict[AliasKey, int],
        known: dict[AdapterVersion, AdapterFacts],
        **more: Any,
    ) -> PlacementTable:
        """The registry says so; what it says of versions is by index too."""
        if "history" in more:
            more["history"] = {
                key: tuple(version(index) for index in indices)
                for key, indices in more["history"].items()
            }
        if "quarantined" in more:
            more["quarantined"] = {version(index): "damaged" for index in more["quarantined"]}
        aliases = {key: version(index) for key, index in desired.items()}
        self.manager.set_registry(RegistryWord(aliases, known, **more))
        return self.plan()

    def plan(self) -> PlacementTable:
        """What the actor does when something happened."""
        if self.manager.wants_tick:
            self.manager.tick()
        self.manager.check_integrity()
        return self.manager.table()

    def tick(self) -> PlacementTable:
        self.manager.tick()
        return self.plan()

    def beat(self, seconds: float = 0.5, times: int = 1) -> PlacementTable:
        """Every replica reports and does what it is told, and what must follow is planned."""
        for _ in range(times):
            self.clock.advance(seconds)
            for replica_id, replica in self.replicas.items():
                orders = self.manager.heartbeat(replica.report(replica_id))
                if orders is None or not replica.obeys:
                    continue
                for wanted in orders.wanted:
                    replica.ask(wanted)
                replica.disk.update(orders.near)
                replica.device -= orders.retired - replica.in_use
            self.plan()
        return self.manager.table()

    def ask(self, index: int, requests: int = 10, work: float = 500.0) -> None:
        """A router tells of requests for a version."""
        self.manager.observe({version(index): DemandSample(requests, work)})

    def holding(self, index: int) -> set[str]:
        return {name for name, one in self.replicas.items() if version(index) in one.device}

    def serving(self, key: AliasKey = KEY) -> AdapterVersion | None:
        return self.manager.table().serving.get(key)
