"""How an alias comes from one version to another: warmed first, then flipped, then the old one freed."""

from __future__ import annotations

import pytest

from cluster.promotion import WARM_WITHIN_S
from cluster.serving import RETIRE_S
from storage.identity import AdapterVersion
from tests.cluster.manager_world import KEY, PROD, Cluster, corrupt, facts, refused, version


@pytest.fixture
def cluster() -> Cluster:
    """Version 1 serves, is asked for, and is held by both replicas."""
    cluster = Cluster("a", "b")
    held(cluster)
    return cluster


def held(cluster: Cluster, rows: int = 4) -> None:
    cluster.publish({KEY: 1}, facts(1, rows=rows))
    cluster.ask(1, requests=1000)
    for name in cluster.tick().holders[version(1)]:
        cluster.replicas[name].ask(version(1))
    cluster.beat(times=2)
    assert cluster.holding(1) == set(cluster.manager.table().holders[version(1)])


def rows_are_free(cluster: Cluster, *indices: int) -> bool:
    return not any(cluster.holding(index) for index in indices)


def why(cluster: Cluster) -> str:
    return cluster.manager.state().moves[KEY].reason


def test_a_new_version_of_an_adapter_nobody_holds_serves_at_once() -> None:
    cluster = Cluster("a", "b")
    cluster.publish({KEY: 1}, facts(1, 2))
    cluster.tick()
    assert cluster.publish({KEY: 2}, facts(1, 2)).serving == {KEY: version(2)}


def test_a_new_version_of_a_held_adapter_serves_only_once_all_who_hold_the_old_one_have_it(
    cluster: Cluster,
) -> None:
    assert cluster.holding(1) == {"a", "b"}
    cluster.replicas["b"].obeys = False
    table = cluster.publish({KEY: 2}, facts(1, 2))
    assert set(table.holders[version(2)]) == {"a", "b"}
    cluster.beat(times=4)
    assert cluster.tick().serving == {KEY: version(1)}
    assert why(cluster) == "warming: on 1 of 2 replicas"
    cluster.replicas["b"].obeys = True
    cluster.beat()  # told to load
    table = cluster.beat()  # reports it loaded, and nobody waits for the next tick
    assert table.serving == {KEY: version(2)}
    assert set(table.holders[version(2)]) == {"a", "b"}
    assert version(1) not in table.holders, "the old version has handed its demand on"
    assert cluster.manager.state().moves == {}


def test_after_the_flip_the_old_version_is_freed_everywhere_when_its_last_request_ends(
    cluster: Cluster,
) -> None:
    cluster.replicas["a"].in_use.add(version(1))
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=4)
    assert cluster.serving() == version(2)
    assert cluster.holding(1) == {"a"}, "a stream is not torn"
    cluster.beat(seconds=RETIRE_S / 4, times=8)
    cluster.beat(times=2)
    assert cluster.holding(1) == {"a"}
    cluster.replicas["a"].in_use.clear()
    cluster.beat(times=2)
    assert rows_are_free(cluster, 1)


def test_requests_that_come_late_do_not_bring_the_old_version_back(cluster: Cluster) -> None:
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=4)
    cluster.ask(1, requests=1000)  # resolved before the flip, told after it
    cluster.replicas["b"].ask(version(1))
    cluster.tick()
    cluster.beat(times=4)
    assert rows_are_free(cluster, 1)
    assert version(1) not in cluster.manager.table().holders


def test_whoever_asks_for_the_old_version_by_its_digest_later_has_it(cluster: Cluster) -> None:
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=4)
    for _ in range(25):
        cluster.beat()
        cluster.tick()
    cluster.ask(1, requests=1000, work=5000.0)
    cluster.replicas["a"].ask(version(1))
    cluster.tick()
    cluster.beat(times=4)
    assert "a" in cluster.holding(1) and version(1) in cluster.manager.table().holders


def test_an_alias_moved_back_before_the_flip_keeps_serving_and_frees_what_it_tried(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat()
    table = cluster.publish({KEY: 1}, facts(1, 2))
    assert table.serving == {KEY: version(1)} and version(2) not in table.holders
    cluster.beat(times=3)
    assert rows_are_free(cluster, 2)


def test_going_back_to_a_version_that_is_still_there_takes_no_time(cluster: Cluster) -> None:
    for replica in cluster.replicas.values():
        replica.in_use.add(version(1))
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=4)
    assert cluster.serving() == version(2) and cluster.holding(1) == {"a", "b"}
    assert cluster.publish({KEY: 1}, facts(1, 2)).serving == {KEY: version(1)}
    cluster.beat(times=3)
    assert cluster.holding(1) == {"a", "b"} and rows_are_free(cluster, 2)


def test_an_alias_moved_twenty_times_ends_at_the_last_version_and_leaves_nothing_behind(
    cluster: Cluster,
) -> None:
    known = facts(*range(1, 22))
    seen: list[AdapterVersion] = []
    for index in range(2, 22):
        cluster.publish({KEY: index}, known)
        cluster.ask(index - 1)
        cluster.beat(times=index % 4)
        served = cluster.serving()
        assert served is not None
        seen.append(served)
    cluster.beat(times=4)
    cluster.tick()
    cluster.beat(times=4)
    assert cluster.serving() == version(21)
    assert len(set(seen)) > 5, "those that had time to be warmed did serve"
    assert rows_are_free(cluster, *range(1, 21))
    assert cluster.manager.table().holders.keys() == {version(21)}


def test_a_successor_replaced_before_it_is_warm_is_never_served(cluster: Cluster) -> None:
    for replica in cluster.replicas.values():
        replica.broken[version(2)] = refused(2)  # it would take for ever
    cluster.publish({KEY: 2}, facts(1, 2, 3))
    cluster.publish({KEY: 3}, facts(1, 2, 3))
    assert cluster.serving() == version(1)
    cluster.beat(times=3)
    assert cluster.serving() == version(3)


def test_another_alias_keeps_its_version_and_its_demand_through_a_flip(cluster: Cluster) -> None:
    cluster.publish({KEY: 1, PROD: 1}, facts(1, 2))
    cluster.publish({KEY: 2, PROD: 1}, facts(1, 2))
    cluster.beat(times=4)
    table = cluster.tick()
    assert table.serving == {KEY: version(2), PROD: version(1)}
    assert version(1) in table.holders and cluster.holding(1)


def test_two_aliases_may_change_places(cluster: Cluster) -> None:
    cluster.publish({KEY: 1, PROD: 2}, facts(1, 2))
    cluster.ask(2, requests=1000)
    cluster.tick()
    cluster.beat(times=4)
    cluster.publish({KEY: 2, PROD: 1}, facts(1, 2))
    cluster.beat(times=4)
    table = cluster.tick()
    assert table.serving == {KEY: version(2), PROD: version(1)}
    assert table.holders.keys() == {version(1), version(2)}
    assert cluster.holding(1) and cluster.holding(2)


def test_aliases_that_follow_each_other_each_get_where_they_should(cluster: Cluster) -> None:
    cluster.publish({KEY: 1, PROD: 2}, facts(1, 2, 3))
    cluster.ask(2, requests=1000)
    cluster.tick()
    cluster.beat(times=4)
    cluster.publish({KEY: 2, PROD: 3}, facts(1, 2, 3))
    cluster.beat(times=4)
    cluster.tick()
    assert cluster.manager.table().serving == {KEY: version(2), PROD: version(3)}
    cluster.beat(times=4)
    assert rows_are_free(cluster, 1) and cluster.holding(2)


def test_a_holder_that_dies_while_it_warms_holds_nobody_up(cluster: Cluster) -> None:
    cluster.replicas["b"].obeys = False
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=4)
    assert cluster.serving() == version(1)
    del cluster.replicas["b"]
    cluster.beat(times=5)
    assert cluster.serving() == version(2)


def test_a_holder_that_never_gets_warm_holds_nobody_up_for_ever(cluster: Cluster) -> None:
    cluster.replicas["b"].obeys = False
    cluster.publish({KEY: 2}, facts(1, 2))
    cluster.beat(times=int(WARM_WITHIN_S / 0.5) - 2)
    assert cluster.tick().serving == {KEY: version(1)}
    cluster.beat(times=4)
    assert cluster.tick().serving == {KEY: version(2)}


def test_a_new_version_that_fits_only_in_the_old_ones_place_serves_cold() -> None:
    cluster = Cluster("a")
    held(cluster, rows=13)
    assert cluster.publish({KEY: 2}, facts(1, 2, rows=13)).serving == {KEY: version(2)}


def test_a_new_version_too_large_for_every_bank_never_replaces_the_old_one(
    cluster: Cluster,
) -> None:
    table = cluster.publish({KEY: 2}, {**facts(1), **facts(2, rows=17)})
    assert table.serving == {KEY: version(1)}
    assert cluster.manager.placement.too_large == (version(2),)
    assert why(cluster) == "no room: it has 17 rows, more than any bank"


# What cannot be loaded.


def test_a_successor_that_no_holder_can_load_is_never_served_and_the_state_says_why(
    cluster: Cluster,
) -> None:
    for replica in cluster.replicas.values():
        replica.broken[version(2)] = refused(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(seconds=1.0, times=int(2 * WARM_WITHIN_S))
    assert cluster.serving() == version(1)
    assert why(cluster) == "failed: adapter_refused: a tensor has a wrong shape"
    orders = cluster.manager.heartbeat(cluster.replicas["a"].report("a"))
    assert orders is not None and version(2) not in orders.wanted, "it is not tried for ever"


def test_a_bad_first_version_makes_way_for_the_next_good_one() -> None:
    cluster = Cluster("a")
    cluster.replicas["a"].failed[version(1)] = refused(1)
    cluster.publish({KEY: 1}, facts(1))
    cluster.beat()
    assert cluster.serving() == version(1), "there is no other; requests are told what is wrong"
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    assert cluster.serving() == version(2)


def test_a_version_refused_while_it_serves_cold_falls_back_to_the_newest_good_one() -> None:
    cluster = Cluster("a", "b")
    cluster.publish({KEY: 3}, facts(1, 2, 3), history={KEY: [2, 1]}, quarantined=[2])
    cluster.tick()
    assert cluster.serving() == version(3)
    cluster.replicas["a"].broken[version(3)] = corrupt(3)
    cluster.replicas["a"].ask(version(3))
    cluster.beat()
    assert cluster.serving() == version(1)


def test_what_one_replica_cannot_load_and_another_holds_is_only_planned_elsewhere(
    cluster: Cluster,
) -> None:
    cluster.replicas["b"].broken[version(2)] = refused(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=4)
    table = cluster.tick()
    assert table.serving == {KEY: version(2)} and table.holders[version(2)] == ("a",)
    state = cluster.manager.state()
    assert state.failed == {}
    assert state.failed_on == {
        version(2): {"b": "adapter_refused: a tensor has a wrong shape"},
    }
    cluster.replicas["b"].failed.clear()
    cluster.replicas["b"].broken.clear()
    cluster.replicas["b"].ask(version(2))  # a request found its way there, and it went well
    cluster.beat()
    assert cluster.manager.state().failed_on == {}


def test_a_version_put_in_quarantine_while_it_serves_makes_way_at_once(cluster: Cluster) -> None:
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=4)
    assert cluster.serving() == version(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]}, quarantined=[2])
    assert cluster.serving() == version(1)
    assert cluster.manager.state().failed == {version(2): "damaged"}
    cluster.beat(times=3)
    assert rows_are_free(cluster, 2) and cluster.holding(1)

    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})  # published again, whole
    cluster.beat(times=4)
    assert cluster.serving() == version(2)


def test_without_any_good_version_an_alias_stays_and_a_request_is_told_why(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 1}, facts(1), quarantined=[1])
    assert cluster.serving() == version(1)


def test_corrupt_bytes_are_a_suspicion_until_somebody_else_has_looked(cluster: Cluster) -> None:
    manager = cluster.manager
    for replica in cluster.replicas.values():
        replica.broken[version(2)] = corrupt(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=2)
    assert [one.version for one in manager.suspects()] == [version(2)]
    assert manager.state().failed.keys() == {version(2)}
    manager.acquit(version(2))  # its stored bytes are good: whoever read them was wrong
    assert manager.suspects() == ()
    cluster.beat()
    assert manager.suspects() == ()
    assert manager.state().failed_on[version(2)].keys() == {"a", "b"}


def test_what_every_replica_calls_corrupt_is_not_served_though_its_stored_bytes_are_whole(
    cluster: Cluster,
) -> None:
    for replica in cluster.replicas.values():
        replica.broken[version(2)] = corrupt(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=2)
    cluster.manager.acquit(version(2))
    for _ in range(4):
        cluster.beat()
        assert cluster.tick().serving == {KEY: version(1)}
    assert why(cluster) == "failed: adapter_corrupt: a file has other bytes"
    cluster.replicas["a"].failed.clear()  # it tries again, and it goes well
    cluster.replicas["a"].broken.clear()
    cluster.beat(times=3)
    assert cluster.tick().serving == {KEY: version(2)}


def test_a_version_published_again_whole_is_served_though_replicas_called_it_corrupt_until_then(
    cluster: Cluster,
) -> None:
    for replica in cluster.replicas.values():
        replica.broken[version(2)] = corrupt(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat(times=2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]}, quarantined=[2])
    cluster.beat()
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat()  # they tell of it once more, late
    for replica in cluster.replicas.values():
        replica.broken.clear()
        replica.failed.clear()
    cluster.beat(times=5)
    assert cluster.serving() == version(2)
    assert cluster.manager.state().failed_on == {}


def test_a_suspect_put_in_quarantine_is_no_suspect_any_more(cluster: Cluster) -> None:
    cluster.replicas["a"].failed[version(2)] = corrupt(2)
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]})
    cluster.beat()
    assert cluster.manager.suspects()
    cluster.publish({KEY: 2}, facts(1, 2), history={KEY: [1]}, quarantined=[2])
    assert cluster.manager.suspects() == ()
    cluster.beat()
    assert cluster.serving() == version(1)


def test_a_version_whose_manifest_cannot_be_read_is_not_served_while_another_can(
    cluster: Cluster,
) -> None:
    cluster.publish({KEY: 2}, facts(1), history={KEY: [1]})
    cluster.beat(times=4)
    assert cluster.serving() == version(1)
    assert why(cluster) == "failed: it cannot be read"
    assert cluster.publish({KEY: 2}, {}, history={KEY: [1]}).serving == {}
