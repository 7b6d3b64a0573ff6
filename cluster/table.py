"""What the cluster knows of itself: who holds which adapter version, and which version each alias serves.

Plain frozen data that crosses processes. `PlacementTable` is the one authority routers and ingresses read; its epochs
only grow, and a reader never goes back one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.changes import Changes
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
    is_brief: bool = False  # `host` and `disk` are left out: they are what the last report said

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
    asks_all: bool = False  # the next report is not to be brief


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
class ReaderReport:
    """What an ingress or router asks its poll with: what it knows already, and what it has seen."""

    epoch: int = 0
    author: int = 0  # who wrote the table it has
    residents_stamp: int = 0
    demand: Mapping[AdapterVersion, DemandSample] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()  # replicas it found dead or leaving
    table: PlacementTable | None = None  # the one it has, when it was asked for it


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """The answer to a reader's poll: what changed since what it has. Only `replicas` is always sent.

    `epoch` 0: the manager has just begun and knows nothing good yet; the reader keeps what it has.
    """

    epoch: int = 0
    author: int = 0
    since: int = 0  # the epoch to which the changes apply; 0 when they are whole
    base_id: str = ""
    replicas: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    serving: Changes[AliasKey, AdapterVersion] = field(default_factory=Changes)
    holders: Changes[AdapterVersion, tuple[str, ...]] = field(default_factory=Changes)
    facts: Changes[AdapterVersion, AdapterFacts] = field(default_factory=Changes)
    residents: Changes[AdapterVersion, tuple[str, ...]] = field(default_factory=Changes)
    residents_stamp: int = 0
    asks_table: bool = False  # to be sent with the next poll

    @classmethod
    def whole(cls, table: PlacementTable, author: int = 0, residents_stamp: int = 0) -> TableUpdate:
        """For a reader that has nothing, or another manager's table."""
        return cls(
            epoch=table.epoch,
            author=author,
            base_id=table.base_id,
            replicas=table.replicas,
            serving=Changes(table.serving, is_whole=True),
            holders=Changes(table.holders, is_whole=True),
            facts=Changes(table.facts, is_whole=True),
            residents=Changes(table.residents, is_whole=True),
            residents_stamp=residents_stamp,
        )

    def applied_to(self, table: PlacementTable) -> PlacementTable:
        """The reader's next table. Parts in which nothing changed are the same objects."""
        return PlacementTable(
            epoch=self.epoch,
            base_id=self.base_id,
            serving=self.serving.applied_to(table.serving),
            holders=self.holders.applied_to(table.holders),
            facts=self.facts.applied_to(table.facts),
            replicas=self.replicas,
            residents=self.residents.applied_to(table.residents),
        )
