"""Which replicas hold which adapters: bounded-load rendezvous hashing with capacity in bank rows.

A pure function of its inputs. Every wanted adapter gets one home while rows allow, then hot ones get more holders,
present holders first. Load is bounded, so no replica is left with all the hot adapters, as plain rendezvous hashing
leaves it (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cluster.config import ClusterSettings
from cluster.rendezvous import preference
from storage.identity import AdapterVersion

HOLDER_SLACK = 2.0
"""A present holder stays one up to this times the mean load: moving costs a load, imbalance only time."""
INCUMBENT_BOOST = 1.5
"""A placed adapter gives up its rows only to one worth this times as much per row."""
MOVES_PER_TICK = 4


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """One version somebody asks for. `work` is rank-weighted tokens per second over all its holders."""

    version: AdapterVersion
    rows: int
    work: float
    copies: int = 1
    replaces: AdapterVersion | None = None  # the version it is loaded beside, to take over from
    is_reserved: bool = False  # to be loaded before anyone asks

    @property
    def value(self) -> float:
        """Tokens per second for each bank row spent: what admission ranks by."""
        return self.work / (1 + self.rows) / max(1, self.rows)

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


def copies_wanted(work: float, total_work: float, num_replicas: int, share: float) -> int:
    """Holders for a version: one more for each `share` (φ) of a replica's fair part of all work."""
    if num_replicas == 0 or total_work <= 0:
        return 1
    fair = total_work / num_replicas
    return min(num_replicas, max(1, math.ceil(work / (share * fair))))


def place(
    wanted: Iterable[WantedAdapter],
    replicas: Iterable[ReplicaSpace],
    previous: Placement,
    settings: ClusterSettings,
) -> Placement:
    """The next plan. The order of `wanted` and `replicas` does not matter.

    Promises: a replica's holders never exceed its rows; who is left out fits nowhere; at most
    `max_loads_per_tick` copies are newly prefetched; present holders are kept before new ones are chosen.
    """
    spaces = sorted(replicas, key=lambda space: space.replica_id)
    return _Plan(spaces, previous, settings).run(_by_rank(wanted, previous))


def _by_rank(wanted: Iterable[WantedAdapter], previous: Placement) -> list[WantedAdapter]:
    """Reserved ones first, then the worthiest of the rows; a successor right behind the version it replaces."""
    items = {item.version: item for item in wanted}

    def key(item: WantedAdapter) -> tuple[bool, float, bool, AdapterVersion]:
        judged = items.get(item.replaces, item) if item.replaces else item
        boost = INCUMBENT_BOOST if judged.version in previous.holders else 1.0
        is_kept = judged.is_reserved and judged.replaces is None
        return not is_kept, -judged.value * boost, item.replaces is not None, item.version

    return sorted(items.values(), key=key)


class _Plan:
    """The state of one run: rows and load so far per replica, holders so far per adapter."""

    def __init__(
        self, spaces: Sequence[ReplicaSpace], previous: Placement, settings: ClusterSettings
    ) -> None:
        self._spaces = {space.replica_id: space for space in spaces}
        self._previous = previous
        self._settings = settings
        self._rows = dict.fromkeys(self._spaces, 0)
        self._load = dict.fromkeys(self._spaces, 0.0)
        self._holders: dict[AdapterVersion, list[str]] = {}
        self._prefetch: set[tuple[AdapterVersion, str]] = set()
        self._loads_left = settings.max_loads_per_tick
        self._mean = 0.0

    def run(self, wanted: Sequence[WantedAdapter]) -> Placement:
        largest = max((space.rows for space in self._spaces.values()), default=0)
        fitting = [item for item in wanted if item.rows <= largest]
        self._mean = sum(item.work for item in fitting) / max(1, len(self._spaces))

        # Homes first: those already placed and worth keeping, then the others by value.
        admitted = self._admitted(fitting)
        incumbents = [item for item in fitting if item.version in admitted and self._current(item)]
        settled = {item.version for item in incumbents}
        for item in (*incumbents, *(item for item in fitting if item.version not in settled)):
            self._settle(item)
        by_work = sorted(fitting, key=lambda item: (-item.work, item.version))
        for item in by_work:
            self._add_copies(item)
        self._rebalance({item.version: item for item in fitting})
        for item in fitting:  # a move may have made room
            if item.version not in self._holders:
                self._settle(item)

        return Placement(
            holders={version: tuple(ids) for version, ids in self._holders.items()},
            prefetch=frozenset(self._prefetch),
            too_large=tuple(item.version for item in wanted if item.rows > largest),
            no_room=tuple(item.version for item in fitting if item.version not in self._holders),
        )

    def _admitted(self, fitting: Sequence[WantedAdapter]) -> set[AdapterVersion]:
        """The most valuable versions that the banks could hold together; only these keep their place."""
        left = sum(self._budget(replica_id) for replica_id in self._spaces)
        admitted = set()
        for item in fitting:
            if item.rows <= left:
                left -= item.rows
                admitted.add(item.version)
        return admitted

    def _budget(self, replica_id: str) -> int:
        return int(self._spaces[replica_id].rows * self._settings.pinned_fraction)

    def _current(self, item: WantedAdapter) -> list[str]:
        """Live replicas that hold it now: as planned before, then by chance."""
        planned = self._previous.holders.get(item.version, ())
        resident = (
            space.replica_id
            for space in self._spaces.values()
            if item.version in space.resident and space.replica_id not in planned
        )
        return [*(replica_id for replica_id in planned if replica_id in self._spaces), *resident]

    def _fits(self, item: WantedAdapter, replica_id: str) -> bool:
        if item.version in self._spaces[replica_id].unfit:
            return False
        used = self._rows[replica_id]
        if used == 0:  # an adapter larger than the planned part may have the bank to itself
            return item.rows <= self._spaces[replica_id].rows
        return used + item.rows <= self._budget(replica_id)

    def _is_light(self, item: WantedAdapter, replica_id: str, slack: float) -> bool:
        load = self._load[replica_id]
        return load == 0 or load + item.share <= slack * self._mean

    def _take(self, item: WantedAdapter, replica_id: str) -> None:
        self._rows[replica_id] += item.rows
        self._load[replica_id] += item.share
        self._holders.setdefault(item.version, []).append(replica_id)
        pair = (item.version, replica_id)
        if pair in self._previous.prefetch and self._must_load(item, replica_id):
            self._prefetch.add(pair)

    def _must_load(self, item: WantedAdapter, replica_id: str) -> bool:
        return item.version not in self._spaces[replica_id].resident

    def _may_load(self, item: WantedAdapter, replica_id: str) -> bool:
        pair = (item.version, replica_id)
        if pair in self._prefetch or not self._must_load(item, replica_id):
            return True
        return self._loads_left > 0

    def _order_load(self, item: WantedAdapter, replica_id: str) -> None:
        pair = (item.version, replica_id)
        if pair not in self._prefetch and self._must_load(item, replica_id):
            self._prefetch.add(pair)
            self._loads_left -= 1

    def _settle(self, item: WantedAdapter) -> None:
        """One home for the item, if any replica has the rows."""
        for replica_id in self._current(item):
            if self._fits(item, replica_id) and self._is_light(item, replica_id, HOLDER_SLACK):
                self._take(item, replica_id)
                break
        else:
            roomy = [r for r in preference(item.version, self._spaces) if self._fits(item, r)]
            if not roomy:
                return
            light = (r for r in roomy if self._is_light(item, r, self._settings.load_slack))
            self._take(item, next(light, min(roomy, key=self._load.__getitem__)))
        home = self._holders[item.version][0]
        if (item.is_reserved or item.copies > 1) and self._may_load(item, home):
            self._order_load(item, home)

    def _add_copies(self, item: WantedAdapter) -> None:
        """More holders, up to `item.copies`: present ones in place, new ones where load and rows allow."""
        holders = self._holders.get(item.version)
        if holders is None:
            return
        current = self._current(item)
        others = [r for r in preference(item.version, self._spaces) if r not in current]
        for replica_id in (*current, *others):
            if len(holders) >= item.copies:
                return
            slack = HOLDER_SLACK if replica_id in current else self._settings.load_slack
            if (
                replica_id not in holders
                and self._fits(item, replica_id)
                and self._is_light(item, replica_id, slack)
                and self._may_load(item, replica_id)
            ):
                self._take(item, replica_id)
                self._order_load(item, replica_id)

    def _rebalance(self, items: Mapping[AdapterVersion, WantedAdapter]) -> None:
        """A few moves from the fullest replica to the emptiest, so one that joined gets its part."""
        for _ in range(MOVES_PER_TICK):
            if len(self._load) < 2:
                return
            full = max(sorted(self._load), key=self._load.__getitem__)
            empty = min(sorted(self._load), key=self._load.__getitem__)
            if self._load[full] <= self._settings.load_slack * self._mean:
                return
            movable = [
                items[version]
                for version, holders in sorted(self._holders.items())
                if full in holders
                and empty not in holders
                and self._fits(items[version], empty)
                and self._may_load(items[version], empty)
            ]
            best = min(movable, key=lambda item: self._peak_after(item, full, empty), default=None)
            gain = self._load[full] - self._peak_after(best, full, empty) if best else 0.0
            if best is None or gain < (self._settings.load_slack - 1) * self._mean:
                return
            self._drop(best, full)
            self._take(best, empty)
            self._order_load(best, empty)

    def _peak_after(self, item: WantedAdapter, full: str, empty: str) -> float:
        return max(self._load[full] - item.share, self._load[empty] + item.share)

    def _drop(self, item: WantedAdapter, replica_id: str) -> None:
        self._rows[replica_id] -= item.rows
        self._load[replica_id] -= item.share
        self._holders[item.version].remove(replica_id)
        self._prefetch.discard((item.version, replica_id))
