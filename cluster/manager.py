"""The placement manager: what the cluster should look like, from what replicas, routers and the registry report.

Pure: no Ray, no threads, no I/O; time comes from the clock passed in. `cluster/actor.py` runs it. It puts together who
lives (`LiveReplicas`), which versions can be served (`VersionHealth`), what each alias serves (`ServingVersions`) and
who holds what (`PlacementPlanner`), and tells replicas and readers what came of it.

A manager that dies is rebuilt from the registry, the replicas' next heartbeats, and the tables readers go on with:
until all of them had time to call, it answers nobody and moves nothing, so no alias goes back a version on half
knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from cluster.beginning import Beginning
from cluster.config import ClusterSettings
from cluster.live_replicas import LiveReplicas
from cluster.orders import orders_for
from cluster.placement import Placement, ReplicaSpace
from cluster.planner import PlacementPlanner, Reservation
from cluster.promotion import Promotion
from cluster.registry_word import RegistryWord
from cluster.serving import Flip, ServingVersions
from cluster.shrinking import Shrinking
from cluster.state import AliasMove, ClusterState
from cluster.table import (
    DemandSample,
    PlacementTable,
    ReaderReport,
    ReplicaOrders,
    ReplicaReport,
    TableUpdate,
)
from cluster.table_log import TableLog
from cluster.ticks import TickInputs, TickResult, make_plan
from cluster.version_health import VersionHealth
from storage.errors import FailedVersion
from storage.identity import AdapterVersion


class PlacementManager:
    """Holds the placement table. Not thread-safe: one caller at a time, except for `plan`.

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
        self._clock = clock
        silence_s = settings.heartbeat_s * settings.missed_heartbeats
        self._beginning: Beginning | None = Beginning(clock() + silence_s)
        self._replicas = LiveReplicas(silence_s, clock)
        self._health = VersionHealth()
        self._serving = ServingVersions(clock)
        self._planner = PlacementPlanner(settings, clock)
        self._plan: Placement | None = None
        self._log = TableLog(base_id, first_epoch)
        self._published = self._serving.serving

        self._word = RegistryWord()
        self._has_registry = False
        self._bad: Mapping[AdapterVersion, str] = {}

        self._demand: list[Mapping[AdapterVersion, DemandSample]] = []
        self._inherited: list[tuple[Flip, float]] = []
        self._shrinking = Shrinking(settings.tick_s, clock)
        self.wants_tick = False
        """Something happened that the plan should follow at once."""

    # What the world reports.

    def heartbeat(self, report: ReplicaReport) -> ReplicaOrders | None:
        """Take one replica's report; answer what it should hold. None while nobody knows: it goes on as it was."""
        replica_id = report.replica_id
        before = self._replicas.get(replica_id)
        if not self._replicas.hear(report):
            return ReplicaOrders(self._log.epoch)  # it holds what its last requests need
        self._bury(self._replicas.expire())
        device = self._replicas[replica_id].device
        self._health.report(replica_id, report.failed, device)
        if not self._has_begun():
            return None
        self.wants_tick |= before is None or before.report.rows != report.rows
        self._follow(loaded=device - before.device if before else device)
        return self._orders(replica_id)

    def poll(self, reader: ReaderReport) -> TableUpdate:
        """Take one reader's report of what it was asked for and saw; answer what has changed since its last one."""
        self.observe(reader.demand)
        self._bury(self._replicas.lose(reader.lost))
        self._bury(self._replicas.expire())
        if self._beginning is not None:
            self._beginning.hear(reader)
        if not self._has_begun():
            return TableUpdate(asks_table=reader.epoch > 0 and reader.table is None)
        return self._log.update(reader, self._replicas)

    def leave(self, replica_ids: Iterable[str]) -> None:
        """Take all replicas that are leaving now, in place of those named before: they finish their requests and get
        no more.

        They are nobody's home from this moment on. One that is no longer named is a replica like any other.
        """
        gone = self._replicas.leave(replica_ids)
        if gone:
            self._shrinking.begin_again()
        self._bury(gone)

    def observe(self, demand: Mapping[AdapterVersion, DemandSample]) -> None:
        """Take one router's report of what it was asked for since its last one."""
        owned: dict[AdapterVersion, DemandSample] = {}
        for version, sample in demand.items():
            owner = version if self._serving.revive(version) else self._serving.heir(version)
            if owner is not None:
                before = owned.get(owner, DemandSample(0, 0.0))
                owned[owner] = DemandSample(
                    before.requests + sample.requests, before.work + sample.work
                )
        if owned:
            self._demand.append(owned)

    def set_registry(self, word: RegistryWord) -> None:
        """Take the registry's word.

        A new alias serves at once, a deleted one no longer, a moved one when its new version is warm.
        """
        self._word, self._has_registry = word, True
        self._health.set_quarantined(word.quarantined)
        if self._has_begun():
            self._follow(is_aimed=False)
            self.wants_tick = True

    def acquit(self, version: AdapterVersion) -> None:
        """Somebody read the version in the registry after a replica called it corrupt, and it is whole."""
        self._health.acquit(version)

    def prepare_to_shrink(self) -> None:
        """A replica may have to go: for some seconds from now, have a second copy of all that has holders made."""
        self.wants_tick |= self._shrinking.want()

    # What the world may ask.

    @property
    def is_ready_to_shrink(self) -> bool:
        """Since it was asked for, everything that has holders was seen on two replicas, whatever tier it is on, or
        could not be brought there in `SHRINK_WAIT_S`.
        """
        return len(self._replicas) > 1 and self._shrinking.is_ready

    def suspects(self) -> tuple[FailedVersion, ...]:
        """Versions that replicas called corrupt and that nobody has read again since: quarantine or `acquit` them."""
        return self._health.suspects()

    def table(self) -> PlacementTable:
        """A copy of the table as it is now."""
        return self._log.table(self._replicas)

    @property
    def placement(self) -> Placement:
        """The plan in force."""
        return self._plan or Placement()

    def state(self, registry_error: str | None = None) -> ClusterState:
        """Everything, for people to look at."""
        self._bury(self._replicas.expire())
        promotion = self._promotion()
        return ClusterState(
            table=self.table(),
            reports=self._replicas.reports(),
            too_large=self.placement.too_large,
            no_room=self.placement.no_room,
            registry_error=registry_error,
            moves={
                key: AliasMove(desired, serving, promotion.why_not(desired))
                for key, desired in self._word.desired.items()
                if (serving := self._serving.serving.get(key)) not in (None, desired)
            },
            failed=self._bad,
            failed_on=self._health.failed_on(),
            pinned=self._pinned(),
            heard_s=self._replicas.ages_s(),
            prefetch=tuple(
                (version, replica_id)
                for version, replica_id in sorted(self.placement.prefetch)
                if not self._replicas.have(version, (replica_id,))
            ),
            demand=self._planner.demand,
            is_settled=self._beginning is None,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the plan or the table contradicts what was reported."""
        self._replicas.check_integrity()
        self._serving.check_integrity()
        rows: dict[str, int] = dict.fromkeys(self._replicas, 0)
        for version, holders in self._log.holders.items():
            assert holders and len(set(holders)) == len(holders), (version, holders)
            for replica_id in holders:
                if replica_id in rows:
                    rows[replica_id] += self._log.facts[version].rows
        for replica_id, used in rows.items():
            capacity = self._replicas[replica_id].report.rows
            assert used <= capacity, f"{replica_id}: {used} rows planned of {capacity}"
        if self._beginning is not None:
            return
        is_good = self._promotion().is_good
        for key in self._word.desired:
            choices, serving = self._word.choices(key), self._log.serving.get(key)
            assert serving == self._serving.serving.get(key), f"{key}: the table has {serving}"
            if serving is None:
                assert not any(each in self._word.facts for each in choices), f"{key} serves none"
            elif not is_good(serving):
                assert not any(map(is_good, choices)), f"{key} serves a bad version"

    # The plan.

    def tick(self) -> PlacementTable:
        """Make a new plan and publish it. For callers with one thread; see `begin_tick` for others."""
        inputs = self.begin_tick()
        while inputs is not None:
            self.end_tick(self.plan(inputs))
            # A flip frees what it left; its successor has the demand.
            inputs = self.begin_tick() if self._inherited else None
        return self.table()

    def begin_tick(self) -> TickInputs | None:
        """What the next plan is to be made from; None while too little is known."""
        self._bury(self._replicas.expire())
        if not self._has_begun():
            return None
        self.wants_tick = False
        self._serving.forget_retired(self._replicas.residents.__contains__)
        self._follow()
        inputs = TickInputs(
            spaces=tuple(
                ReplicaSpace(
                    r, one.report.rows, one.device, self._health.unfit(r), one.report.num_bytes
                )
                for r in self._replicas
                for one in [self._replicas[r]]
            ),
            facts=self._word.facts,
            reserved=tuple(self._reserved()),
            demand=tuple(self._demand),
            inherited=tuple(self._inherited),
            kept=self._replicas.kept() if self._shrinking.is_wanted else None,
            bad=self._bad,
        )
        self._demand, self._inherited = [], []
        return inputs

    def plan(self, inputs: TickInputs) -> TickResult:
        """The next plan. Needs no lock beside the other methods, but one caller at a time."""
        return make_plan(self._planner, inputs)

    def end_tick(self, result: TickResult) -> None:
        """Put a plan in force."""
        self._plan = result.placement
        self._shrinking.set_missing(result.near)
        self._follow()
        self._publish()

    # What follows from a report.

    def _has_begun(self) -> bool:
        """Whether enough is known to answer; begins to, the first time."""
        beginning = self._beginning
        if beginning is None:
            return True
        if not beginning.is_over(self._clock(), has_registry=self._has_registry):
            return False
        recalled, self._beginning = beginning.recalled, None
        if recalled is not None:
            self._serving.recall(recalled.serving)
            if not self._has_registry:
                self._word = RegistryWord(recalled.serving, recalled.facts)
        self._follow(is_aimed=False)
        for superseded in {v for history in self._word.history.values() for v in history}:
            if superseded in self._replicas.residents:
                self._serving.retire(superseded)
        self.wants_tick = True
        return True

    def _bury(self, replica_ids: Iterable[str]) -> None:
        """These replicas are gone."""
        for replica_id in replica_ids:
            self._health.forget(replica_id)
            self.wants_tick = True

    def _follow(
        self, *, is_aimed: bool = True, loaded: Collection[AdapterVersion] | None = None
    ) -> None:
        """Let aliases move where they should and can.

        Args:
            is_aimed: nothing but the health of versions may have changed where they should.
            loaded: nothing else may have changed when they can: these versions are on a device where they were not.
        """
        word, bad = self._word, self._health.bad(self._replicas.residents, list(self._replicas))
        if bad != self._bad or not is_aimed:
            self._bad, loaded = bad, None
            is_good = self._promotion().is_good
            self._serving.aim(word.desired, word.history, is_good, word.facts.__contains__)
            self.wants_tick = True
        for flip in self._serving.flip(self._promotion().is_ready, loaded):
            self._inherited.append((flip, self._work_ratio(flip)))
            self.wants_tick = True
        if self._serving.serving is not self._published:
            self._publish()

    def _promotion(self) -> Promotion:
        return Promotion(self._replicas, self._word.facts, self._bad, self._plan)

    def _work_ratio(self, flip: Flip) -> float:
        old, new = self._word.facts.get(flip.old), self._word.facts[flip.new]
        return new.work_per_token / old.work_per_token if old else 1.0

    def _pinned(self) -> dict[AdapterVersion, int]:
        """What an administrator wants held whoever asks for it, and how often."""
        is_good, serving = self._promotion().is_good, self._serving.serving
        return {
            version: copies
            for key, copies in self._word.pins.items()
            if copies and (version := serving.get(key)) and is_good(version)
        }

    def _reserved(self) -> list[Reservation]:
        """Successors that are being warmed, and what is pinned."""
        holders = self.placement.holders
        successors = [
            Reservation(new, replaces=old)
            for new, olds in sorted(self._serving.predecessors().items())
            for old in sorted(olds, key=lambda old: (len(holders.get(old, ())), old))
        ]
        pinned = [Reservation(v, copies=n) for v, n in sorted(self._pinned().items())]
        return [*successors, *pinned]

    # What is told.

    def _publish(self) -> None:
        serving = self._serving.serving
        known = self._word.facts
        holders = self.placement.holders
        if not holders.keys() <= known.keys():
            holders = {v: ids for v, ids in holders.items() if v in known}
        named = known.keys() & {*serving.values(), *holders}
        facts = dict(zip(named, map(known.__getitem__, named), strict=True))
        self._published = serving
        self._log.publish(serving, holders, facts)

    def _orders(self, replica_id: str) -> ReplicaOrders:
        replica = self._replicas[replica_id]
        return orders_for(
            replica,
            self.placement,
            self._word.facts,
            epoch=self._log.epoch,
            spare_rows=self._word.largest_within(replica.report.rows),
            kept=self._pinned(),
            bad=self._bad,
            retired=self._serving.retired,
            near=self._shrinking.missing_at(replica_id),
        )
