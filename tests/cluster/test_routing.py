"""The order in which a request tries the replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.rendezvous import preference
from cluster.routing import MEMORY_S, Routing
from cluster.table import PlacementTable, ReplicaLoad
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE = AdapterVersion("1" * 64)
names = st.sampled_from("abcdef")


def loads(work: Mapping[str, float]) -> dict[str, ReplicaLoad]:
    return {replica_id: ReplicaLoad(amount) for replica_id, amount in work.items()}


@given(
    candidates=st.sets(names, min_size=1),
    holders=st.lists(names, unique=True),
    residents=st.lists(names, unique=True),
    work=st.dictionaries(names, st.floats(0, 100)),
    version=st.sampled_from([None, ONE]),
)
def test_every_candidate_is_tried_exactly_once_whatever_the_table_says(
    candidates, holders, residents, work, version
) -> None:
    table = PlacementTable(
        holders={ONE: tuple(holders)}, residents={ONE: tuple(residents)}, replicas=loads(work)
    )
    order = Routing(ManualClock()).order(version, candidates, table)
    assert sorted(order) == sorted(candidates)


def test_loaded_holders_come_first_then_residents_then_loading_holders_then_the_rest() -> None:
    table = PlacementTable(
        holders={ONE: ("loading", "busy", "idle")},
        residents={ONE: ("busy", "idle", "lucky", "gone")},
        replicas=loads({"busy": 90.0, "idle": 10.0}),
    )
    candidates = ["x", "y", "lucky", "busy", "loading", "idle"]
    order = Routing(ManualClock()).order(ONE, candidates, table)
    assert order == ["idle", "busy", "lucky", "loading", *preference(ONE, ["x", "y"])]


def test_an_adapter_nobody_holds_goes_to_one_place_whoever_is_busy() -> None:
    candidates = ["a", "b", "c"]
    table = PlacementTable(replicas=loads({"a": 100.0, "b": 0.0, "c": 50.0}))
    assert Routing(ManualClock()).order(ONE, candidates, table) == preference(ONE, candidates)


def test_the_base_model_goes_to_the_least_busy() -> None:
    table = PlacementTable(replicas=loads({"a": 10.0, "b": 0.0, "c": 5.0}))
    assert Routing(ManualClock()).order(None, ["a", "b", "c"], table) == ["b", "c", "a"]


def test_a_replica_that_reports_nothing_is_tried_last_not_taken_for_idle() -> None:
    table = PlacementTable(replicas=loads({"a": 10.0, "c": 5.0}))
    assert Routing(ManualClock()).order(None, ["a", "silent", "c"], table) == [
        "c",
        "a",
        "silent",
    ]


def test_work_assigned_since_the_last_heartbeat_counts_and_fades() -> None:
    clock = ManualClock()
    routing = Routing(clock)
    table = PlacementTable(
        holders={ONE: ("a", "b")},
        residents={ONE: ("a", "b")},
        replicas=loads({"a": 10.0, "b": 0.0}),
    )
    assert routing.order(ONE, ["a", "b"], table) == ["b", "a"]
    routing.choose("first", "b", 30.0)
    table = PlacementTable(
        holders={ONE: ("a", "b")},
        residents={ONE: ("a", "b")},
        replicas=loads({"a": 10.0, "b": 0.0}),
    )
    assert routing.order(ONE, ["a", "b"], table) == ["a", "b"]
    routing.finish("first")
    clock.advance(5 * MEMORY_S)
    table = replace(table, replicas=loads({"a": 10.0, "b": 0.0}))
    assert routing.order(ONE, ["a", "b"], table) == ["b", "a"]


def test_a_request_that_moves_on_leaves_no_work_behind() -> None:
    routing = Routing(ManualClock())
    table = PlacementTable(replicas=loads({"a": 0.0, "b": 0.0, "c": 0.0}))
    routing.choose("one", "a", 50.0)
    assert routing.order(None, ["a", "b", "c"], table) == ["b", "c", "a"]
    routing.choose("one", "b", 50.0)
    assert routing.order(None, ["a", "b", "c"], table) == ["a", "c", "b"]
    assert routing.is_chosen("one")
    routing.give_up("one")
    assert routing.order(None, ["a", "b", "c"], table) == ["a", "b", "c"]
    assert not routing.is_chosen("one")
