"""What the cluster knows of itself: who holds which adapter version, and which version each alias serves.

Plain frozen data that crosses processes. `PlacementTable` is the one authority routers and ingresses read; its epochs
only grow, and a reader never goes back one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from storage.identity import AdapterVersion

AliasKey = tuple[str, str, str]
"""(tenant, adapter name, alias)."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What placement and routing must know of a version without reading its files."""

    rows: int  # most rows in any one module: its size in the bank
    num_bytes: int

    @property
    def work_per_token(self) -> float:
        """Rank-weighted cost of one token: the base row and the adapter's rows."""
        return 1.0 + self.rows


@dataclass(frozen=True, slots=True)
class DemandSample:
    """What one router sent to one version since its last report."""

    requests: int
    work: float  # rank-weighted tokens


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One heartbeat from a replica. `work` is rank-weighted tokens queued and running."""

    replica_id: str
    rows: int  # capacity of its bank
    num_bytes: int
    device: tuple[AdapterVersion, ...] = ()
    host: tuple[AdapterVersion, ...] = ()
    disk: tuple[AdapterVersion, ...] = ()
    work: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    loads: int = 0
    evictions: int = 0
    rows_used: int = 0
    tokens_out: int = 0
    node_id: str = ""
    threads: int = 0  # CPU threads its model computes on
    load_wait_s: float = 0.0  # how long its steps have waited for loads of adapters, in all


@dataclass(frozen=True, slots=True)
class ReplicaOrders:
    """The answer to a heartbeat: what the replica should hold, most wanted first, and what of it must stay."""

    epoch: int
    wanted: tuple[AdapterVersion, ...] = ()
    pinned: frozenset[AdapterVersion] = frozenset()


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """Valid until a table with a higher epoch is seen. `holders` are replica ids in order of preference.

    `work` and `residents` move with every heartbeat and do not raise the epoch.
    """

    epoch: int = 0
    base_id: str = ""
    serving: Mapping[AliasKey, AdapterVersion] = field(default_factory=dict)
    holders: Mapping[AdapterVersion, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[AdapterVersion, AdapterFacts] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)  # live replicas → rank-weighted tokens
    residents: Mapping[AdapterVersion, tuple[str, ...]] = field(default_factory=dict)  # on a device

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(sorted(self.work))


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """The answer to a reader's poll. `table` is None when the reader already has this epoch."""

    epoch: int
    table: PlacementTable | None
    work: Mapping[str, float]
    residents: Mapping[AdapterVersion, tuple[str, ...]]
