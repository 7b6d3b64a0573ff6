"""What the cluster knows of itself: who holds which adapter version, and which version each alias serves.

Plain frozen data that crosses processes. `PlacementTable` is the one authority routers and ingresses read; its epochs
only grow, and a reader never goes back one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from storage.errors import FailedVersion
from storage.figures import Figures
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
class ReplicaLoad:
    """How busy a replica is: what routers weigh."""

    work: float = 0.0  # rank-weighted tokens queued and running
    num_running: int = 0
    num_waiting: int = 0
    slots: int = 0  # sequences it runs at once; 0 when it did not say
    load_s: float = 0.0  # recent seconds to bring an adapter to its device


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
    slots: int = 0  # sequences it runs at once
    load_s: float = 0.0  # recent seconds to bring an adapter to its device; 0 before the first
    failed: tuple[FailedVersion, ...] = ()  # versions that exist and that it could not load
    is_registry_up: bool = True
    kv_used: float = 0.0  # part of the KV cache in use, 0 to 1
    misses: int = 0  # requests that found their adapter not on the device, since start
    queued_work: float = 0.0  # the part of `work` that waits
    first_token_p99_s: float = 0.0
    figures: Figures = field(default_factory=Figures)  # what only metrics read

    @property
    def load(self) -> ReplicaLoad:
        """What of it routers must know."""
        return ReplicaLoad(self.work, self.num_running, self.num_waiting, self.slots, self.load_s)


@dataclass(frozen=True, slots=True)
class ReplicaOrders:
    """The answer to a heartbeat: what the replica should hold, most wanted first, and what of it must stay."""

    epoch: int
    wanted: tuple[AdapterVersion, ...] = ()
    pinned: frozenset[AdapterVersion] = frozenset()
    near: tuple[AdapterVersion, ...] = ()  # to have on disk or in host memory at least
    retired: frozenset[AdapterVersion] = frozenset()
    """Versions a successor replaced: to be freed on the device once no request holds them."""


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """Valid until a table with a higher epoch is seen. `holders` are replica ids in order of preference.

    `replicas` and `residents` move with every heartbeat and do not raise the epoch.
    """

    epoch: int = 0
    base_id: str = ""
    serving: Mapping[AliasKey, AdapterVersion] = field(default_factory=dict)
    holders: Mapping[AdapterVersion, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[AdapterVersion, AdapterFacts] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaLoad] = field(default_factory=dict)  # the live ones
    residents: Mapping[AdapterVersion, tuple[str, ...]] = field(default_factory=dict)  # on a device


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """The answer to a reader's poll. `table` is None when the reader already has this epoch."""

    epoch: int
    table: PlacementTable | None
    replicas: Mapping[str, ReplicaLoad]
    residents: Mapping[AdapterVersion, tuple[str, ...]]
