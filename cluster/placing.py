"""How a plan is made: bounded-load rendezvous hashing with capacity in bank rows and bytes.

A function of its inputs alone. The adapters worth the most per row are admitted, with all their copies, until the banks
are full; whoever is held already stays while its replica is not overloaded; newcomers go to the first replica of their
own ranking with room and little load. Load is bounded, so no replica is left with all the hot adapters, as plain
rendezvous hashing leaves it (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from cluster.config import ClusterSettings
from cluster.placement import Placement, ReplicaSpace, WantedAdapter
from cluster.planned_replica import Budget, PlannedReplica
from cluster.rendezvous import Rankings
from storage.identity import AdapterVersion

HOLDER_SLACK = 2.0
"""A present holder stays one up to this times the mean load: moving costs a load, imbalance only time."""
INCUMBENT_BOOST = 1.25
"""A placed adapter gives up its rows only to one worth this times as much per row."""
FULLEST_LOAD = 1.15
"""Times the mean: what an estimate of demand is off by anyway. A replica planned for more gives some of it away."""


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
    rankings: Rankings | None = None,
    budget: Budget | None = None,
) -> Placement:
    """The next plan. The order of `wanted` and `replicas` does not matter.

    Promises: a replica's holders never exceed its rows and bytes; who is left out fits nowhere; no more copies are
    newly prefetched or moved than `budget` has, which is lowered by them; present holders are kept before new ones are
    chosen. Rows are left for what comes by chance (`SPARE_ADAPTERS`). Without a budget it has a whole tick's.
    """
    spaces = sorted(replicas, key=lambda space: space.replica_id)
    budget = budget or Budget(settings.max_loads_per_tick)
    items = _by_rank(wanted, previous)
    largest = max((space.rows for space in spaces), default=0)
    rows = [item.rows for item in items if item.rows <= largest]
    mean_rows = sum(rows) / max(1, len(rows))
    planned = [PlannedReplica(space, settings.pinned_fraction, mean_rows) for space in spaces]
    plan = _Plan(planned, previous, settings, rankings or Rankings(), budget)
    return plan.run(items)


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
    """The state of one run: what each replica has so far, and who holds each adapter."""

    def __init__(
        self,
        replicas: Sequence[PlannedReplica],
        previous: Placement,
        settings: ClusterSettings,
        rankings: Rankings,
        budget: Budget,
    ) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._previous = previous
        self._settings = settings
        self._rankings = rankings
        self._holders: dict[AdapterVersion, list[str]] = {}
        self._prefetch: set[tuple[AdapterVersion, str]] = set()
        self._budget = budget
        self._mean = 0.0
        self._most_left: float = math.inf  # no replica has more rows left
        self._residents: dict[AdapterVersion, list[str]] = {}
        for replica in replicas:
            for version in replica.space.resident:
                self._residents.setdefault(version, []).append(replica.replica_id)

    def run(self, wanted: Sequence[WantedAdapter]) -> Placement:
        largest = max((r.space.rows for r in self._replicas.values()), default=0)
        fitting = [item for item in wanted if item.rows <= largest]
        admitted = self._admitted(fitting)
        # Who is not admitted is served anywhere, so its work is nobody's load.
        self._mean = sum(item.work for item in admitted) / max(1, len(self._replicas))

        for item in admitted:
            self._keep(item)
        for item in sorted(admitted, key=lambda item: (-item.work, item.version)):
            self._settle(item)
        self._rebalance({item.version: item for item in fitting})
        for item in fitting:  # not admitted, or in the way of a move
            if item.version not in self._holders:
                self._keep(item)
                self._settle(item)

        return Placement(
            holders={
                item.version: tuple(held)
                for item in fitting
                if (held := self._holders.get(item.version))
            },
            prefetch=frozenset(self._prefetch),
            too_large=tuple(item.version for item in wanted if item.rows > largest),
            no_room=tuple(item.version for item in fitting if item.version not in self._holders),
        )

    def _admitted(self, fitting: Sequence[WantedAdapter]) -> list[WantedAdapter]:
        """The most valuable versions that the banks could hold together, with all their copies."""
        left = sum(replica.rows_left for replica in self._replicas.values())
        admitted = []
        for item in fitting:
            if item.rows * item.copies <= left:
                left -= item.rows * item.copies
                admitted.append(item)
        return admitted

    # Who stays.

    def _keep(self, item: WantedAdapter) -> None:
        """Hold the item where it is held or resident now, as far as rows and load allow."""
        planned = [r for r in self._previous.holders.get(item.version, ()) if r in self._replicas]
        lucky = [r for r in self._residents.get(item.version, ()) if r not in planned]
        if len(lucky) > 1:
            ranking = self._rankings.of(item.version, self._replicas.keys())
            lucky.sort(key=lambda r: (self._replicas[r].load, ranking.index(r)))
        current = [*planned, *lucky]
        if item.copies == 1:  # to stay where it is costs nothing, to be where it was planned a load
            current.sort(key=lambda r: self._must_load(item, r))
        for replica_id in current:
            if len(self._holders.get(item.version, ())) >= max(item.copies, len(planned)):
                break
            replica = self._replicas[replica_id]
            if replica.fits(item) and replica.is_light(item, HOLDER_SLACK * self._mean):
                self._take(item, replica)
        held = self._holders.get(item.version, ())
        while len(held) > item.copies:
            fullest = max(held, key=lambda r: (self._replicas[r].load, r))
            self._drop(item, self._replicas[fullest])

    # Who comes.

    def _settle(self, item: WantedAdapter) -> None:
        """One home for the item if any replica has the rows, and more holders up to its copies."""
        held = self._holders.get(item.version, [])
        if not held:
            home = self._home(item)
            if home is None:
                return
            self._take(item, home)
            held = self._holders[item.version]
        if item.copies > 1 or item.is_reserved:
            for replica_id in held:
                if self._may_load(item, replica_id):
                    self._order_load(item, replica_id)
        if len(held) < item.copies:
            self._add_copies(item)

    def _home(self, item: WantedAdapter) -> PlannedReplica | None:
        if item.rows > self._most_left:
            return None
        roomy = [replica for replica in self._ranked(item) if replica.fits(item)]
        if not roomy:
            self._most_left = max(map(PlannedReplica.most_left, self._replicas.values()), default=0)
            return None
        bound = self._settings.load_slack * self._mean
        light = (replica for replica in roomy if replica.is_light(item, bound))
        return next(light, min(roomy, key=lambda replica: replica.load))

    def _add_copies(self, item: WantedAdapter) -> None:
        held = self._holders[item.version]
        bound = self._settings.load_slack * self._mean
        for replica in self._ranked(item):
            if len(held) >= item.copies:
                return
            if (
                replica.replica_id not in held
                and replica.fits(item)
                and replica.is_light(item, bound)
                and self._may_load(item, replica.replica_id)
            ):
                self._take(item, replica)
                self._order_load(item, replica.replica_id)

    def _ranked(self, item: WantedAdapter) -> Iterator[PlannedReplica]:
        return map(
            self._replicas.__getitem__, self._rankings.of(item.version, self._replicas.keys())
        )

    # Books.

    def _take(self, item: WantedAdapter, replica: PlannedReplica) -> None:
        replica.take(item)
        self._holders.setdefault(item.version, []).append(replica.replica_id)
        pair = (item.version, replica.replica_id)
        if pair in self._previous.prefetch and self._must_load(item, replica.replica_id):
            self._prefetch.add(pair)

    def _drop(self, item: WantedAdapter, replica: PlannedReplica) -> None:
        replica.drop(item)
        self._holders[item.version].remove(replica.replica_id)
        self._prefetch.discard((item.version, replica.replica_id))
        self._most_left = math.inf

    def _must_load(self, item: WantedAdapter, replica_id: str) -> bool:
        return item.version not in self._replicas[replica_id].space.resident

    def _may_load(self, item: WantedAdapter, replica_id: str) -> bool:
        pair = (item.version, replica_id)
        if pair in self._prefetch or not self._must_load(item, replica_id):
            return True
        return self._budget.loads > 0

    def _order_load(self, item: WantedAdapter, replica_id: str) -> None:
        pair = (item.version, replica_id)
        if pair not in self._prefetch and self._must_load(item, replica_id):
            self._prefetch.add(pair)
            self._budget.loads -= 1

    # Evening out.

    def _rebalance(self, items: Mapping[AdapterVersion, WantedAdapter]) -> None:
        """A few moves from the fullest replica to the emptiest, so one that joined gets its part."""
        replicas = list(self._replicas.values())
        while self._budget.moves > 0 and len(replicas) > 1:
            full = max(replicas, key=lambda replica: replica.load)
            empty = min(replicas, key=lambda replica: replica.load)
            if full.load <= FULLEST_LOAD * self._mean or not self._move(full, empty, items):
                return
            self._budget.moves -= 1

    def _move(
        self,
        full: PlannedReplica,
        empty: PlannedReplica,
        items: Mapping[AdapterVersion, WantedAdapter],
    ) -> bool:
        """Move what evens out the two best, if anything does."""
        half = (full.load - empty.load) / 2  # what would leave both alike
        least_gain = (self._settings.load_slack - 1) * self._mean
        movable = [
            items[version]
            for version, held in self._holders.items()
            if full.replica_id in held
            and empty.replica_id not in held
            and self._may_load(items[version], empty.replica_id)
        ]
        for item in sorted(movable, key=partial(_distance, half)):
            if min(item.share, 2 * half - item.share) < least_gain:
                return False
            if self._make_way(item, empty, items):
                self._drop(item, full)
                self._take(item, empty)
                self._order_load(item, empty.replica_id)
                return True
        return False

    def _make_way(
        self,
        item: WantedAdapter,
        replica: PlannedReplica,
        items: Mapping[AdapterVersion, WantedAdapter],
    ) -> bool:
        """Have the item fit, if only adapters held nowhere else and less worth per row are in its way."""
        in_its_way = [
            other
            for version, held in self._holders.items()
            if held == [replica.replica_id]
            and (other := items[version]).value < item.value
            and not (other.is_reserved or other.replaces)
        ]
        in_its_way.sort(key=lambda other: (other.value, other.version))
        gone = []
        for other in in_its_way:
            if replica.fits(item):
                break
            replica.drop(other)
            gone.append(other)
        if not replica.fits(item):
            for other in gone:
                replica.take(other)
            return False
        for other in gone:
            del self._holders[other.version]
            self._prefetch.discard((other.version, replica.replica_id))
        return True


def _distance(wished: float, item: WantedAdapter) -> tuple[float, AdapterVersion]:
    return abs(item.share - wished), item.version
