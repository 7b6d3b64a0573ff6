"""Whatever happens in whatever order, the manager keeps its promises (`check_integrity` has more of them)."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.table import AdapterFacts, AliasKey, PlacementTable
from cluster.view import TableView
from storage.errors import FailedVersion
from tests.cluster.manager_world import Cluster, Replica, corrupt, refused, version

NAMES = st.sampled_from("abcd")
ALIASES = st.sampled_from(["latest", "prod"])
VERSIONS = st.integers(0, 5)


class AnyHistory(RuleBasedStateMachine):
    """Replicas come, go, disobey and fail; versions are published, moved, deleted, damaged, pinned and asked for; the
    manager dies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.desired: dict[AliasKey, int] = {}
        self.history: dict[AliasKey, list[int]] = {}
        self.quarantined: set[int] = set()
        self.pins: dict[AliasKey, int] = {}
        self.facts = {version(i): AdapterFacts(rows=1 + 3 * i, num_bytes=10) for i in range(6)}
        self.view = TableView(self.cluster.clock, ttl_s=30.0)
        self.last = self.cluster.manager.table()

    def tell(self) -> None:
        self.cluster.publish(
            self.desired,
            self.facts,
            history=self.history,
            quarantined=self.quarantined,
            pins=self.pins,
        )

    @rule(name=NAMES, rows=st.integers(4, 20))
    def join(self, name: str, rows: int) -> None:
        self.cluster.add(name, rows=rows)

    @rule(name=NAMES)
    def vanish(self, name: str) -> None:
        self.cluster.replicas.pop(name, None)

    @rule(names=st.sets(NAMES, max_size=2))
    def leave(self, names: set[str]) -> None:
        self.cluster.manager.leave(names)

    @rule(name=NAMES, which=VERSIONS, failure=st.sampled_from([corrupt, refused]))
    def fail(self, name: str, which: int, failure) -> None:
        replica = self.cluster.replicas.get(name, Replica())
        told: FailedVersion = failure(which)
        replica.broken[told.version] = replica.failed[told.version] = told

    @rule(name=NAMES)
    def mend(self, name: str) -> None:
        replica = self.cluster.replicas.get(name, Replica())
        replica.broken.clear()
        replica.failed.clear()

    @rule(name=NAMES, which=VERSIONS)
    def ask_replica(self, name: str, which: int) -> None:
        self.cluster.replicas.get(name, Replica()).ask(version(which))

    @rule(obeys=st.booleans(), seconds=st.floats(0.1, 2.0))
    def beat(self, obeys: bool, seconds: float) -> None:
        for replica in self.cluster.replicas.values():
            replica.obeys = obeys
        self.cluster.beat(seconds)

    @rule(name=st.sampled_from("pq"), alias=ALIASES, which=VERSIONS)
    def move_alias(self, name: str, alias: str, which: int) -> None:
        key = ("default", name, alias)
        if key in self.desired and self.desired[key] != which:
            before = [self.desired[key], *self.history.get(key, [])]
            self.history[key] = [one for one in dict.fromkeys(before) if one != which]
        self.desired[key] = which
        self.tell()

    @rule(name=st.sampled_from("pq"))
    def delete(self, name: str) -> None:
        for alias in ("latest", "prod"):
            self.desired.pop(("default", name, alias), None)
            self.history.pop(("default", name, alias), None)
        self.tell()

    @rule(which=VERSIONS)
    def quarantine(self, which: int) -> None:
        self.quarantined ^= {which}
        self.tell()

    @rule(copies=st.integers(0, 3))
    def pin(self, copies: int) -> None:
        self.pins = {("default", "p", "latest"): copies}
        self.tell()

    @rule()
    def judge(self) -> None:
        for suspect in self.cluster.manager.suspects():
            self.cluster.manager.acquit(suspect.version)

    @rule(which=st.integers(0, 7), work=st.floats(0.1, 1000.0))
    def ask(self, which: int, work: float) -> None:
        self.cluster.ask(which, work=work)

    @rule()
    def prepare_to_shrink(self) -> None:
        self.cluster.manager.prepare_to_shrink()

    @rule()
    def tick(self) -> None:
        self.cluster.tick()

    @rule(lost=st.sets(NAMES, max_size=1))
    def poll(self, lost: set[str]) -> None:
        for name in lost:
            self.view.record_lost(name)
        self.view.offer(self.cluster.manager.poll(self.view.take_report()))
        self.cluster.plan()
        self.view.offer(self.cluster.manager.poll(self.view.take_report()))
        if self.cluster.manager.state().is_settled:
            assert self.view.table == self.cluster.manager.table(), "changes lead where a copy does"

    @rule(gap_s=st.floats(0.0, 4.0))
    def die(self, gap_s: float) -> None:
        self.cluster.restart()
        self.last = PlacementTable()
        self.tell()
        for _ in range(4):
            self.view.offer(self.cluster.manager.poll(self.view.take_report()))
            self.cluster.clock.advance(gap_s / 4)

    @invariant()
    def it_keeps_its_promises(self) -> None:
        manager = self.cluster.manager
        manager.check_integrity()
        table = manager.table()
        assert table.epoch >= self.last.epoch
        if table.epoch == self.last.epoch:
            same = replace(table, replicas=self.last.replicas, residents=self.last.residents)
            assert same == self.last
        self.last = table


AnyHistory.TestCase.settings = hypothesis_settings(
    max_examples=80, stateful_step_count=30, deadline=None
)
test_any_history_keeps_the_promises = AnyHistory.TestCase
