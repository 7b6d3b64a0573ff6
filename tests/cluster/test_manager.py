"""The placement manager: who lives, what is held, and what replicas and readers are told of it."""

from __future__ import annotations

import pytest

from cluster.shrinking import SHRINK_WAIT_S
from cluster.table import AdapterFacts, ReaderReport, ReplicaLoad
from tests.cluster.manager_world import KEY, Cluster, facts, refused, report, version


@pytest.fixture
def cluster() -> Cluster:
    return Cluster("a", "b")


def test_a_first_version_serves_at_once(cluster: Cluster) -> None:
    table = cluster.publish({KEY: 1}, facts(1))
    assert table.serving == {KEY: version(1)}
    assert table.facts[version(1)].work_per_token == 5.0


def test_a_deleted_alias_serves_no_longer(cluster: Cluster) -> None:
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1)
    cluster.tick()
    table = cluster.publish({}, {})
    assert table.serving == {} and table.holders == {}


def test_a_replica_that_is_leaving_is_nobodys_home_while_it_finishes_its_requests(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1, requests=1000)
    cluster.tick()
    cluster.beat(times=3)
    assert set(cluster.tick().holders[version(1)]) == {"a", "b"}
    cluster.manager.leave(["b"])
    for _ in range(3):  # its heart goes on beating
        table = cluster.beat()
        assert table.holders[version(1)] == ("a",)
        assert set(table.replicas) == {"a"} and table.residents[version(1)] == ("a",)
    orders = cluster.manager.heartbeat(report("b", version(1)))
    assert orders is not None and orders.wanted == ()
    cluster.manager.leave([])
    assert set(cluster.beat().replicas) == {"a", "b"}, "it stays after all"


def test_the_epoch_grows_only_when_something_changed(cluster: Cluster) -> None:
    first = cluster.publish({KEY: 1}, facts(1)).epoch
    cluster.beat()
    assert cluster.tick().epoch == first
    cluster.ask(1)
    assert cluster.tick().epoch == first + 1
    assert cluster.tick().epoch == first + 1


def test_a_manager_on_a_slower_clock_overtakes_its_predecessors_epoch(cluster: Cluster) -> None:
    update = cluster.manager.poll(ReaderReport(epoch=10**9, author=7))
    assert update.epoch > 10**9 and update.serving.is_whole


def test_a_replica_that_misses_three_heartbeats_is_dead_and_its_adapters_are_rehomed(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1)
    (first, *_) = cluster.tick().holders[version(1)]
    cluster.beat()
    del cluster.replicas[first]
    for _ in range(3):
        assert first in cluster.beat().replicas
    cluster.clock.advance(0.01)
    (survivor,) = cluster.replicas
    assert cluster.manager.poll(ReaderReport()).replicas.keys() == {survivor}
    assert cluster.manager.wants_tick, "at once, not with the next tick"
    assert cluster.plan().holders[version(1)] == (survivor,)


def test_a_replica_that_a_router_found_dead_is_dead_at_once_unless_its_heart_beats(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1)
    cluster.tick()
    cluster.beat()
    update = cluster.manager.poll(ReaderReport(lost=frozenset({"a", "nobody"})))
    assert update.replicas.keys() == {"b"}
    assert cluster.plan().holders[version(1)] == ("b",)
    assert "a" in cluster.beat().replicas


def test_orders_pin_only_what_leaves_room_for_the_largest_adapter(cluster: Cluster) -> None:
    sizes = {**facts(1, 2), **facts(3, rows=9)}
    names = {("default", f"n{i}", "latest"): i for i in (1, 2, 3)}
    cluster.publish(names, sizes)
    cluster.ask(1, work=900.0)
    cluster.ask(2, work=800.0)
    cluster.tick()
    orders = cluster.manager.heartbeat(report("a", version(1), version(2)))
    assert orders is not None and set(orders.wanted) == {version(1), version(2)}
    assert sum(sizes[each].rows for each in orders.pinned) <= 16 - 9


def test_a_brief_report_keeps_what_was_said_of_memory_and_disk_and_is_refused_when_nothing_was(
    cluster: Cluster,
) -> None:
    both = (version(1), version(2))
    manager = cluster.manager
    first = manager.heartbeat(report("c", version(1), host=both, disk=both))
    again = manager.heartbeat(report("c", is_brief=True))
    unknown = manager.heartbeat(report("d", is_brief=True))
    assert first is not None and not first.asks_all
    assert again is not None and not again.asks_all
    assert unknown is not None and unknown.asks_all
    told = {one.replica_id: one for one in manager.state().reports}
    assert (told["c"].host, told["c"].disk, told["c"].device) == (both, both, ())
    asked = manager.heartbeat(report("d", host=both))
    assert asked is not None and not asked.asks_all


def test_a_reader_gets_all_once_and_then_only_what_changed(cluster: Cluster) -> None:
    names = {("default", f"n{i}", "latest"): i for i in range(20)}
    cluster.publish(names, facts(*range(20), rows=1))
    cluster.beat()
    manager = cluster.manager
    first = manager.poll(ReaderReport())
    assert first.serving.is_whole and len(first.serving.values) == 20

    known = ReaderReport(first.epoch, first.author, first.residents_stamp)
    nothing = manager.poll(known)
    assert nothing.epoch == first.epoch
    changes = (nothing.serving, nothing.holders, nothing.facts, nothing.residents)
    assert not any(one.values or one.gone or one.is_whole for one in changes)
    assert nothing.replicas == {"a": ReplicaLoad(), "b": ReplicaLoad()}

    cluster.publish({**names, KEY: 3}, facts(*range(20), rows=1))
    cluster.replicas["a"].device.add(version(3))
    cluster.beat()
    some = manager.poll(known)
    assert dict(some.serving.values) == {KEY: version(3)} and not some.serving.is_whole
    assert dict(some.residents.values) == {version(3): ("a",)}


def test_a_pinned_adapter_is_held_as_often_as_asked_though_nobody_asks_for_it() -> None:
    cluster = Cluster("a", "b", "c", rows=16)
    cluster.publish({KEY: 1}, facts(1), pins={KEY: 2})
    cluster.beat(times=3)
    assert len(cluster.holding(1)) == 2
    for name in cluster.holding(1):
        orders = cluster.manager.heartbeat(cluster.replicas[name].report(name))
        assert orders is not None and orders.pinned == {version(1)}
    assert cluster.manager.state().pinned == {version(1): 2}
    assert cluster.publish({KEY: 1}, facts(1)).holders == {}


def test_a_pin_stays_though_somebody_published_an_adapter_as_large_as_the_bank() -> None:
    cluster = Cluster("a")
    large = ("other", "large", "latest")
    cluster.publish({KEY: 1, large: 2}, {**facts(1), **facts(2, rows=16)}, pins={KEY: 1})
    cluster.beat(times=2)
    orders = cluster.manager.heartbeat(cluster.replicas["a"].report("a"))
    assert orders is not None and orders.pinned == {version(1)}


def test_a_pin_comes_before_demand_and_follows_the_alias_to_its_new_version() -> None:
    cluster = Cluster("a")
    other = ("default", "clerk", "latest")
    known = facts(1, 2, 3, rows=6)
    cluster.publish({KEY: 1, other: 3}, known, pins={KEY: 1})
    cluster.ask(3, work=1e6)
    cluster.tick()
    cluster.beat(times=2)
    assert version(1) in cluster.manager.table().holders
    cluster.publish({KEY: 2, other: 3}, known, pins={KEY: 1})
    cluster.beat(times=4)
    table = cluster.tick()
    assert table.serving[KEY] == version(2)
    assert version(2) in table.holders and version(1) not in table.holders


def test_before_a_replica_may_leave_everything_wanted_is_on_two() -> None:
    cluster = Cluster("a", "b", "c")
    names = {("default", f"n{i}", "latest"): i for i in range(12)}
    cluster.publish(names, facts(*range(12), rows=1))
    for index in range(12):
        cluster.ask(index, work=1.0)
    cluster.tick()
    for index in range(12):
        name = cluster.manager.table().holders[version(index)][0]
        cluster.replicas[name].ask(version(index))
    cluster.beat()
    assert not cluster.manager.is_ready_to_shrink, "nobody asked"
    cluster.manager.prepare_to_shrink()
    assert not cluster.manager.is_ready_to_shrink
    for _ in range(4):
        cluster.beat()
        cluster.tick()
    cluster.manager.prepare_to_shrink()
    assert cluster.manager.is_ready_to_shrink
    for index in range(12):
        kept = [one for one in cluster.replicas.values() if version(index) in one.disk]
        assert len(kept) >= 2
    cluster.beat(times=60)
    assert not cluster.manager.is_ready_to_shrink, "the lease is over"


def test_what_no_bank_has_room_for_keeps_no_replica_from_leaving() -> None:
    cluster = Cluster("a", "b")
    names = {("default", f"n{i}", "latest"): i for i in range(12)}
    cluster.publish(names, facts(*range(12)))
    for index in range(12):
        cluster.ask(index, work=1.0)
    held = cluster.tick().holders
    assert len(held) < 12 and cluster.manager.placement.no_room
    cluster.manager.prepare_to_shrink()
    cluster.beat(times=4)
    cluster.tick()
    assert cluster.manager.is_ready_to_shrink
    for one in cluster.replicas.values():
        assert one.disk <= held.keys()


def test_no_second_copy_is_asked_of_a_replica_that_cannot_load_it() -> None:
    cluster = Cluster("a", "b")
    cluster.replicas["b"].failed[version(1)] = refused(1)
    cluster.replicas["a"].ask(version(1))
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1)
    cluster.tick()
    cluster.beat()
    cluster.manager.prepare_to_shrink()
    cluster.tick()
    assert cluster.manager.is_ready_to_shrink


def test_a_replica_leaves_in_the_end_though_a_second_copy_is_never_made(cluster: Cluster) -> None:
    cluster.publish({KEY: 1}, facts(1))
    cluster.ask(1)
    cluster.tick()
    for replica in cluster.replicas.values():
        replica.obeys = False
    for _ in range(int(SHRINK_WAIT_S)):
        cluster.manager.prepare_to_shrink()
        assert not cluster.manager.is_ready_to_shrink
        cluster.beat(seconds=1.0)
        cluster.tick()
    cluster.manager.prepare_to_shrink()
    assert cluster.manager.is_ready_to_shrink
    cluster.add("c")
    cluster.manager.leave(["b"])
    assert not cluster.manager.is_ready_to_shrink, "the next one waits as long again"


def test_the_last_replica_is_never_ready_to_leave() -> None:
    cluster = Cluster("a")
    cluster.manager.prepare_to_shrink()
    cluster.tick()
    assert not cluster.manager.is_ready_to_shrink


def test_the_state_says_who_was_heard_of_and_what_is_planned(cluster: Cluster) -> None:
    cluster.publish({KEY: 1}, {version(1): AdapterFacts(2, 100)}, pins={KEY: 2})
    cluster.clock.advance(0.25)
    state = cluster.manager.state()
    assert state.heard_s == {"a": 0.25, "b": 0.25}
    assert set(state.prefetch) == {(version(1), "a"), (version(1), "b")}
    assert state.is_settled
    cluster.beat(times=2)
    assert cluster.manager.state().prefetch == ()
