"""A reader never goes back an epoch, and knows how old its table is."""

from __future__ import annotations

from cluster.table import DemandSample, PlacementTable, ReplicaLoad, TableUpdate
from cluster.view import TableView
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE = AdapterVersion("1" * 64)


def full(epoch: int, base_id: str = "base") -> TableUpdate:
    return TableUpdate(epoch, PlacementTable(epoch=epoch, base_id=base_id), {}, {})


def test_epochs_only_grow_and_an_older_table_is_not_news() -> None:
    clock = ManualClock()
    view = TableView(clock)
    assert view.offer(full(7))
    clock.advance(5.0)
    assert not view.offer(full(6, base_id="older"))
    assert view.table.base_id == "base"
    assert view.age_s == 5.0


def test_a_confirmation_of_the_same_epoch_brings_fresh_work_and_makes_the_table_young() -> None:
    clock = ManualClock()
    view = TableView(clock)
    view.offer(full(7))
    clock.advance(5.0)
    assert view.offer(TableUpdate(7, None, {"a": ReplicaLoad(3.0)}, {ONE: ("a",)}))
    assert view.table.replicas == {"a": ReplicaLoad(3.0)} and view.table.residents == {ONE: ("a",)}
    assert view.age_s == 0.0


def test_a_view_that_never_heard_a_manager_is_infinitely_old() -> None:
    view = TableView(ManualClock())
    assert view.age_s == float("inf")
    assert not view.offer(TableUpdate(9, None, {}, {}))
    assert view.age_s == float("inf")


def test_demand_is_handed_over_once() -> None:
    view = TableView(ManualClock())
    view.record(ONE, 10.0)
    view.record(ONE, 5.0)
    assert view.take_demand() == {ONE: DemandSample(2, 15.0)}
    assert view.take_demand() == {}


def test_what_a_router_lost_is_reported_once() -> None:
    view = TableView(ManualClock())
    view.record_lost("a")
    view.record_lost("a")
    assert view.take_lost() == {"a"}
    assert view.take_lost() == frozenset()
