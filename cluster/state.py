"""The whole state of a cluster at one moment, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.table import AliasKey, PlacementTable, ReplicaReport
from storage.figures import Figures
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias that does not serve what it should."""

    desired: AdapterVersion
    serving: AdapterVersion
    reason: str  # "warming on 2 of 3 replicas", "failed: …"


@dataclass(frozen=True, slots=True)
class ClusterState:
    """`too_large` and `no_room` are asked for and have no planned holder; the first can never be served here."""

    table: PlacementTable
    reports: tuple[ReplicaReport, ...] = ()
    too_large: tuple[AdapterVersion, ...] = ()
    no_room: tuple[AdapterVersion, ...] = ()
    registry_error: str | None = None  # why the registry could not be read the last time
    moves: Mapping[AliasKey, AliasMove] = field(default_factory=dict)
    failed: Mapping[AdapterVersion, str] = field(default_factory=dict)
    """Versions no alias is moved to, and why: quarantined, or refused by replicas."""
    failed_on: Mapping[AdapterVersion, Mapping[str, str]] = field(default_factory=dict)
    """Versions that good replicas hold and these could not load: replica id → why."""
    pinned: Mapping[AdapterVersion, int] = field(default_factory=dict)  # copies an admin asked for
    heard_s: Mapping[str, float] = field(default_factory=dict)  # seconds since the last heartbeat
    prefetch: tuple[tuple[AdapterVersion, str], ...] = ()  # planned loads: version, replica id
    figures: Mapping[str, Figures] = field(default_factory=dict)
    """By replica id, also of replicas that left, and the manager's own; see `cluster.figures`."""
    demand: Mapping[AdapterVersion, float] = field(default_factory=dict)
    """Rank-weighted tokens per second, of what is asked for, by the last plan."""
    is_settled: bool = True  # false for the first seconds of a manager, which then moves no alias
    plan_s: float = 0.0  # how long the last plan took to make
