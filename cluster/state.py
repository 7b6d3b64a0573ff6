"""The whole state of a cluster at one moment, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.table import PlacementTable, ReplicaReport
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class ClusterState:
    """`too_large` and `no_room` are asked for and have no planned holder; the first can never be served here."""

    table: PlacementTable
    reports: tuple[ReplicaReport, ...] = ()
    too_large: tuple[AdapterVersion, ...] = ()
    no_room: tuple[AdapterVersion, ...] = ()
    registry_error: str | None = None  # why the registry could not be read the last time
