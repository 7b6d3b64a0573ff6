"""What placement is about: adapters that are wanted, the replicas there are, and the plan of who holds what.

`cluster/placing.py` makes the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """One version somebody asks for. `work` is rank-weighted tokens per second over all its holders."""

    version: AdapterVersion
    rows: int
    work: float
    copies: int = 1
    requests: float = 0.0  # per second
    num_bytes: int = 0
    replaces: AdapterVersion | None = None  # the version it is loaded beside, to take over from
    is_reserved: bool = False  # to be loaded before anyone asks

    @property
    def value(self) -> float:
        """Requests per second for each bank row spent: what admission ranks by."""
        return self.requests / max(1, self.rows)

    @property
    def share(self) -> float:
        """The work each holder takes on."""
        return self.work / self.copies


@dataclass(frozen=True, slots=True)
class ReplicaSpace:
    """What placement must know of a live replica."""

    replica_id: str
    rows: int
    resident: frozenset[AdapterVersion] = frozenset()
    unfit: frozenset[AdapterVersion] = frozenset()  # what it could not load: never planned here
    num_bytes: int | None = None  # of all adapters it may hold; None: as many as the rows


@dataclass(frozen=True)
class Placement:
    """The plan. `holders` are in order of preference; nothing wanted is missing without being named.

    `prefetch` are copies to load before a request asks; other copies that are not resident load with their first one.
    """

    holders: Mapping[AdapterVersion, tuple[str, ...]] = field(default_factory=dict)
    prefetch: frozenset[tuple[AdapterVersion, str]] = frozenset()
    too_large: tuple[AdapterVersion, ...] = ()  # larger than every bank
    no_room: tuple[AdapterVersion, ...] = ()  # served from the banks' least recently used rows

    @cached_property
    def by_replica(self) -> Mapping[str, tuple[AdapterVersion, ...]]:
        """What each replica holds, most wanted first."""
        held: dict[str, list[AdapterVersion]] = {}
        for version, replica_ids in self.holders.items():
            for replica_id in replica_ids:
                held.setdefault(replica_id, []).append(version)
        return {replica_id: tuple(versions) for replica_id, versions in held.items()}
