"""A manager that died is rebuilt from the registry, the replicas and the readers, and nothing goes back meanwhile."""

from __future__ import annotations

import pytest

from cluster.table import ReaderReport
from cluster.view import TableView
from tests.cluster.manager_world import KEY, PROD, SETTLING_S, Cluster, facts, version


class Reader:
    """An ingress."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.view = TableView(cluster.clock, ttl_s=30.0)

    def poll(self) -> None:
        self.view.offer(self.cluster.manager.poll(self.view.take_report()))


@pytest.fixture
def cluster() -> Cluster:
    """Version 1 serves and is held by both replicas."""
    cluster = Cluster("a", "b")
    cluster.publish({KEY: 1}, facts(1, 2))
    cluster.ask(1, requests=1000)
    cluster.tick()
    cluster.beat(times=3)
    cluster.ask(1, requests=1000)
    return cluster


@pytest.fixture
def reader(cluster: Cluster) -> Reader:
    reader = Reader(cluster)
    reader.poll()
    return reader


def rebuild(cluster: Cluster, *readers: Reader) -> None:
    """Everybody calls twice a second until the new manager answers."""
    for _ in range(4):
        cluster.beat()
        for reader in readers:
            reader.poll()
            reader.view.record(version(1), 50.0)


def test_it_finds_everything_where_it_was_and_continues_the_epochs(
    cluster: Cluster, reader: Reader
) -> None:
    before = cluster.manager.table()
    cluster.restart()
    cluster.publish({KEY: 1}, facts(1, 2))
    rebuild(cluster, reader)
    after = cluster.tick()
    assert after.serving == before.serving
    assert after.residents == before.residents
    assert set(after.holders[version(1)]) == set(before.holders[version(1)])
    assert after.epoch > before.epoch
    reader.poll()
    assert reader.view.table == after


def test_until_all_had_time_to_call_nobody_is_told_anything_and_readers_keep_what_they_have(
    cluster: Cluster, reader: Reader
) -> None:
    known = reader.view.table
    cluster.restart()
    assert cluster.manager.heartbeat(cluster.replicas["a"].report("a")) is None
    cluster.publish({KEY: 2}, facts(1, 2))
    assert cluster.manager.tick().serving == {}
    reader.poll()
    assert reader.view.table is known
    assert not cluster.manager.state().is_settled
    rebuild(cluster, reader)
    assert cluster.manager.state().is_settled


def test_in_the_middle_of_a_pre_warm_the_old_version_goes_on_and_the_new_one_takes_over_warm(
    cluster: Cluster, reader: Reader
) -> None:
    cluster.replicas["b"].obeys = False
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=3)
    reader.poll()
    cluster.restart()
    cluster.publish({KEY: 2}, facts(1, 2))
    rebuild(cluster, reader)
    assert reader.view.table.serving == {KEY: version(1)}, "no half knowledge flips it"
    cluster.replicas["b"].obeys = True
    cluster.beat(times=4)
    cluster.tick()
    reader.poll()
    assert reader.view.table.serving == {KEY: version(2)}
    assert cluster.holding(2) == {"a", "b"}


def test_right_after_a_flip_no_reader_is_taken_back(cluster: Cluster, reader: Reader) -> None:
    slow = Reader(cluster)
    slow.poll()
    for replica in cluster.replicas.values():
        replica.in_use.add(version(1))  # streams keep the old version on the device
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=3)
    reader.poll()
    assert reader.view.table.serving == {KEY: version(2)}
    assert slow.view.table.serving == {KEY: version(1)}
    cluster.restart()
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    slow.poll()
    for _ in range(6):
        rebuild(cluster, slow, reader)
        assert reader.view.table.serving == {KEY: version(2)}
    assert slow.view.table.serving == {KEY: version(2)}


def test_what_was_superseded_before_is_freed(cluster: Cluster, reader: Reader) -> None:
    cluster.replicas["a"].in_use.add(version(1))
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=4)
    reader.poll()
    assert cluster.holding(1) == {"a"}
    cluster.restart()
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.replicas["a"].in_use.clear()
    rebuild(cluster)
    reader.poll()
    cluster.beat(times=2)
    assert cluster.holding(1) == set()


def test_without_a_registry_what_readers_know_is_served(cluster: Cluster, reader: Reader) -> None:
    known = reader.view.table
    cluster.restart()
    rebuild(cluster, reader)
    reader.poll()
    assert reader.view.table.epoch > known.epoch and reader.view.age_s == 0.0
    assert reader.view.table.serving == known.serving
    assert reader.view.table.facts == known.facts
    cluster.publish({KEY: 1, PROD: 2}, facts(1, 2))  # it comes back
    assert cluster.manager.table().serving == {KEY: version(1), PROD: version(2)}


def test_without_a_registry_and_with_readers_it_cannot_learn_from_it_says_nothing(
    cluster: Cluster, reader: Reader
) -> None:
    known = reader.view.table
    cluster.restart()
    for _ in range(10):  # a reader that does not tell what it has
        update = cluster.manager.poll(ReaderReport(epoch=known.epoch, author=1))
        cluster.beat()
    assert update.epoch == 0 and not reader.view.offer(update)
    assert reader.view.table is known


def test_readers_that_asked_the_registry_meanwhile_are_not_taken_back(
    cluster: Cluster, reader: Reader
) -> None:
    cluster.clock.advance(60.0)  # no manager: past its table's time, the reader asks the registry
    cluster.restart()
    cluster.publish({KEY: 2}, facts(1, 2))
    rebuild(cluster, reader)
    assert reader.view.table.serving == {KEY: version(2)}


def test_a_first_manager_answers_as_soon_as_it_may() -> None:
    cluster = Cluster()
    cluster.restart()
    reader = Reader(cluster)
    cluster.publish({KEY: 1}, facts(1))
    cluster.add("a")
    reader.poll()
    assert reader.view.table.epoch == 0
    cluster.clock.advance(SETTLING_S)
    cluster.beat()
    reader.poll()
    assert reader.view.table.serving == {KEY: version(1)}
    assert reader.view.table.replicas.keys() == {"a"}
