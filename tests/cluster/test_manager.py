"""The placement manager: who lives, what serves, what is held, driven by a clock that moves when told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.config import ClusterSettings
from cluster.manager import PlacementManager
from cluster.table import AdapterFacts, AliasKey, DemandSample, PlacementTable, ReplicaReport
from storage.identity import AdapterVersion, sha256_hex
from tests.cluster.clocks import ManualClock

KEY: AliasKey = ("default", "poet", "latest")


def version(index: int) -> AdapterVersion:
    return AdapterVersion(sha256_hex(f"adapter {index}".encode()))


def facts(*versions: AdapterVersion, rows: int = 4) -> dict[AdapterVersion, AdapterFacts]:
    return {each: AdapterFacts(rows=rows, num_bytes=100) for each in versions}


def report(replica_id: str, *device: AdapterVersion, rows: int = 16) -> ReplicaReport:
    return ReplicaReport(replica_id, rows=rows, num_bytes=1000, device=device)


class Cluster:
    """A manager with replicas that do as they are told."""

    def __init__(self, **settings: float) -> None:
        self.clock = ManualClock()
        self.manager = PlacementManager(ClusterSettings(**settings), "base", 1, self.clock)
        self.device: dict[str, set[AdapterVersion]] = {}
        self.obeys = True

    def add(self, *replica_ids: str) -> None:
        for replica_id in replica_ids:
            self.device[replica_id] = set()
        self.beat()

    def beat(self, seconds: float = 0.5) -> PlacementTable:
        """Time passes; every replica reports, and loads what it is told."""
        self.clock.advance(seconds)
        for replica_id, device in self.device.items():
            orders = self.manager.heartbeat(report(replica_id, *sorted(device)))
            if self.obeys:
                device.update(orders.wanted)
        self.manager.check_integrity()
        return self.manager.table()

    def ask(self, which: AdapterVersion, requests: int = 10, work: float = 500.0) -> None:
        self.manager.observe({which: DemandSample(requests, work)})


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.add("a", "b")
    return cluster


def test_a_first_version_serves_at_once(cluster: Cluster) -> None:
    table = cluster.manager.set_registry({KEY: version(1)}, facts(version(1)))
    assert table.serving == {KEY: version(1)}
    assert table.facts[version(1)].work_per_token == 5.0


def test_a_replica_that_is_leaving_is_nobodys_home_while_it_finishes_its_requests(
    cluster: Cluster,
) -> None:
    cluster.manager.set_registry({KEY: version(1)}, facts(version(1)))
    cluster.ask(version(1), requests=1000)
    for _ in range(3):
        cluster.manager.tick()
        table = cluster.beat()
    assert set(table.holders[version(1)]) == {"a", "b"}
    cluster.manager.leave(["b"])
    for _ in range(3):  # its heart goes on beating
        table = cluster.beat()
        assert table.holders[version(1)] == ("a",)
        assert set(table.replicas) == {"a"} and table.residents[version(1)] == ("a",)
    assert cluster.manager.heartbeat(report("b", version(1))).wanted == ()
    cluster.manager.leave([])
    assert set(cluster.beat().replicas) == {"a", "b"}, "it stays after all"


def test_a_deleted_alias_serves_no_longer(cluster: Cluster) -> None:
    cluster.manager.set_registry({KEY: version(1)}, facts(version(1)))
    cluster.ask(version(1))
    cluster.manager.tick()
    table = cluster.manager.set_registry({}, {})
    assert table.serving == {} and table.holders == {}
    cluster.manager.check_integrity()


def test_a_new_version_of_an_adapter_nobody_holds_serves_at_once(cluster: Cluster) -> None:
    both = facts(version(1), version(2))
    cluster.manager.set_registry({KEY: version(1)}, both)
    assert cluster.manager.set_registry({KEY: version(2)}, both).serving == {KEY: version(2)}


def test_a_new_version_of_a_held_adapter_serves_only_once_it_is_warm(cluster: Cluster) -> None:
    both = facts(version(1), version(2))
    cluster.manager.set_registry({KEY: version(1)}, both)
    cluster.ask(version(1))
    holders = cluster.manager.tick().holders[version(1)]
    cluster.beat()

    cluster.obeys = False
    table = cluster.manager.set_registry({KEY: version(2)}, both)
    cluster.beat()
    assert table.serving == {KEY: version(1)}
    assert table.holders[version(2)] == holders
    assert cluster.manager.tick().serving == {KEY: version(1)}

    cluster.obeys = True
    cluster.beat()  # told to load
    cluster.beat()  # reports it loaded
    table = cluster.manager.tick()
    assert table.serving == {KEY: version(2)}
    assert table.holders[version(2)] == holders
    assert version(1) not in table.holders, "the old version has handed its demand on"


def test_an_alias_moved_back_before_the_flip_keeps_serving_what_it_did(cluster: Cluster) -> None:
    both = facts(version(1), version(2))
    cluster.manager.set_registry({KEY: version(1)}, both)
    cluster.ask(version(1))
    cluster.manager.tick()
    cluster.manager.set_registry({KEY: version(2)}, both)
    table = cluster.manager.set_registry({KEY: version(1)}, both)
    assert table.serving == {KEY: version(1)} and version(2) not in table.holders


def test_a_new_version_that_fits_only_in_the_old_ones_place_serves_cold() -> None:
    cluster = Cluster()
    cluster.add("a")
    both = facts(version(1), version(2), rows=13)
    cluster.manager.set_registry({KEY: version(1)}, both)
    cluster.ask(version(1))
    cluster.manager.tick()
    assert cluster.manager.set_registry({KEY: version(2)}, both).serving == {KEY: version(2)}


def test_a_new_version_too_large_for_every_bank_never_replaces_the_old_one(
    cluster: Cluster,
) -> None:
    both = {**facts(version(1)), **facts(version(2), rows=17)}
    cluster.manager.set_registry({KEY: version(1)}, both)
    cluster.ask(version(1))
    cluster.manager.tick()
    table = cluster.manager.set_registry({KEY: version(2)}, both)
    assert table.serving == {KEY: version(1)}
    assert cluster.manager.placement.too_large == (version(2),)


def test_another_alias_keeps_its_version_and_its_demand_through_a_flip(cluster: Cluster) -> None:
    both = facts(version(1), version(2))
    prod: AliasKey = ("default", "poet", "prod")
    cluster.manager.set_registry({KEY: version(1), prod: version(1)}, both)
    cluster.ask(version(1))
    cluster.manager.tick()
    cluster.manager.set_registry({KEY: version(2), prod: version(1)}, both)
    cluster.beat()
    cluster.beat()
    table = cluster.manager.tick()
    assert table.serving == {KEY: version(2), prod: version(1)}
    assert version(1) in table.holders


def test_the_epoch_grows_only_when_something_changed(cluster: Cluster) -> None:
    first = cluster.manager.set_registry({KEY: version(1)}, facts(version(1))).epoch
    cluster.beat()
    assert cluster.manager.tick().epoch == first
    cluster.ask(version(1))
    assert cluster.manager.tick().epoch == first + 1
    assert cluster.manager.tick().epoch == first + 1


def test_a_reader_gets_the_table_once_and_then_only_what_moves(cluster: Cluster) -> None:
    cluster.manager.set_registry({KEY: version(1)}, facts(version(1)))
    update = cluster.manager.poll(0)
    assert update.table is not None and update.table.serving == {KEY: version(1)}
    again = cluster.manager.poll(update.epoch)
    assert again.table is None and again.replicas.keys() == {"a", "b"}


def test_a_manager_on_a_slower_clock_overtakes_its_predecessors_epoch(cluster: Cluster) -> None:
    update = cluster.manager.poll(10**9)
    assert update.table is not None and update.epoch == update.table.epoch > 10**9


def test_a_replica_that_misses_three_heartbeats_is_dead_and_its_adapters_are_rehomed(
    cluster: Cluster,
) -> None:
    cluster.manager.set_registry({KEY: version(1)}, facts(version(1)))
    cluster.ask(version(1))
    cluster.manager.tick()
    cluster.beat()
    (first, *_) = cluster.manager.table().holders[version(1)]
    del cluster.device[first]
    for _ in range(3):
        assert first in cluster.beat().replicas
    cluster.beat(seconds=0.01)
    table = cluster.manager.poll(0).table
    assert table is not None
    (survivor,) = cluster.device
    assert table.replicas.keys() == {survivor}
    assert table.holders[version(1)] == (survivor,)


def test_a_replica_that_a_router_found_dead_is_dead_at_once_unless_its_heart_beats(
    cluster: Cluster,
) -> None:
    cluster.add("a", "b")
    one = version(1)
    cluster.manager.set_registry({KEY: one}, facts(one))
    cluster.ask(one)
    cluster.manager.tick()
    cluster.beat()
    cluster.manager.lose(frozenset({"a", "nobody"}))
    table = cluster.manager.table()
    assert table.replicas.keys() == {"b"}
    assert table.holders[one] == ("b",)
    assert "a" in cluster.beat().replicas


def test_a_rebuilt_manager_finds_everything_where_it_was_and_continues_the_epochs(
    cluster: Cluster,
) -> None:
    both = facts(version(1), version(2), rows=12)
    desired = {KEY: version(1), ("default", "clerk", "latest"): version(2)}
    cluster.manager.set_registry(desired, both)
    cluster.ask(version(1))
    cluster.ask(version(2))
    cluster.manager.tick()
    for name in cluster.device:  # their first requests loaded them
        cluster.device[name] = {
            v for v, held in cluster.manager.table().holders.items() if name in held
        }
    before = cluster.beat()

    cluster.manager = PlacementManager(ClusterSettings(), "base", before.epoch + 1, cluster.clock)
    cluster.manager.set_registry(desired, both)
    cluster.beat()
    cluster.ask(version(1))
    cluster.ask(version(2))
    after = cluster.manager.tick()
    assert after.serving == before.serving
    assert after.holders == before.holders
    assert after.residents == before.residents
    assert after.epoch > before.epoch


def test_orders_pin_only_what_leaves_room_for_the_largest_adapter(cluster: Cluster) -> None:
    sizes = {**facts(version(1), version(2)), **facts(version(3), rows=9)}
    cluster.manager.set_registry(
        {("default", f"n{i}", "latest"): v for i, v in enumerate(sizes)}, sizes
    )
    cluster.ask(version(1), work=900.0)
    cluster.ask(version(2), work=800.0)
    cluster.manager.tick()
    orders = cluster.manager.heartbeat(report("a", version(1), version(2)))
    assert set(orders.wanted) == {version(1), version(2)}
    assert sum(sizes[v].rows for v in orders.pinned) <= 16 - 9


class AnyHistory(RuleBasedStateMachine):
    """Replicas come, go silent and disobey; versions are published, moved, deleted and asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.desired: dict[AliasKey, AdapterVersion] = {}
        self.facts = {version(i): AdapterFacts(rows=1 + 3 * i, num_bytes=10) for i in range(6)}
        self.last = self.cluster.manager.table()

    @rule(name=st.sampled_from("abcd"))
    def join(self, name: str) -> None:
        self.cluster.add(name)

    @rule(name=st.sampled_from("abcd"))
    def vanish(self, name: str) -> None:
        self.cluster.device.pop(name, None)

    @rule(obeys=st.booleans(), seconds=st.floats(0.1, 2.0))
    def beat(self, obeys: bool, seconds: float) -> None:
        self.cluster.obeys = obeys
        self.cluster.beat(seconds)

    @rule(name=st.sampled_from("pq"), which=st.integers(0, 5))
    def move_alias(self, name: str, which: int) -> None:
        self.desired["default", name, "latest"] = version(which)
        self.cluster.manager.set_registry(self.desired, self.facts)

    @rule(name=st.sampled_from("pq"))
    def delete(self, name: str) -> None:
        self.desired.pop(("default", name, "latest"), None)
        self.cluster.manager.set_registry(self.desired, self.facts)

    @rule(which=st.integers(0, 7), work=st.floats(0.1, 1000.0))
    def ask(self, which: int, work: float) -> None:
        self.cluster.ask(version(which), work=work)

    @rule()
    def tick(self) -> None:
        self.cluster.manager.tick()

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
    max_examples=60, stateful_step_count=30, deadline=None
)
test_any_history_keeps_the_promises = AnyHistory.TestCase
