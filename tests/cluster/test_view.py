"""A reader never goes back an epoch, knows how old its table is, and hands over what it recorded once."""

from __future__ import annotations

from cluster.changes import Changes
from cluster.table import DemandSample, PlacementTable, ReplicaLoad, TableUpdate
from cluster.view import TableView
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE = AdapterVersion("1" * 64)
KEY = ("default", "poet", "latest")


def full(epoch: int, base_id: str = "base") -> TableUpdate:
    return TableUpdate.whole(PlacementTable(epoch=epoch, base_id=base_id), author=1)


def test_epochs_only_grow_and_an_older_table_is_not_news() -> None:
    clock = ManualClock()
    view = TableView(clock)
    assert view.offer(full(7))
    clock.advance(5.0)
    assert not view.offer(full(6, base_id="older"))
    assert view.table.base_id == "base"
    assert view.age_s == 5.0


def test_a_confirmation_of_the_same_epoch_brings_fresh_loads_and_makes_the_table_young() -> None:
    clock = ManualClock()
    view = TableView(clock)
    view.offer(full(7))
    serving = view.table.serving
    clock.advance(5.0)
    update = TableUpdate(
        epoch=7,
        author=1,
        since=7,
        replicas={"a": ReplicaLoad(3.0)},
        residents=Changes({ONE: ("a",)}),
        residents_stamp=12,
    )
    assert view.offer(update)
    assert view.table.replicas == {"a": ReplicaLoad(3.0)} and view.table.residents == {ONE: ("a",)}
    assert view.table.serving is serving, "what did not change is the same object"
    assert view.age_s == 0.0
    assert view.take_report().residents_stamp == 12


def test_changes_of_another_table_are_not_taken() -> None:
    view = TableView(ManualClock())
    view.offer(full(7))
    news = Changes({KEY: ONE})
    assert not view.offer(TableUpdate(epoch=9, author=1, since=8, serving=news))
    assert not view.offer(TableUpdate(epoch=9, author=2, since=7, serving=news))
    assert view.offer(TableUpdate(epoch=9, author=1, since=7, serving=news))
    assert view.table.epoch == 9 and view.table.serving == {KEY: ONE}


def test_a_view_that_never_heard_a_manager_is_infinitely_old() -> None:
    view = TableView(ManualClock())
    assert view.age_s == float("inf")
    assert not view.offer(TableUpdate(epoch=9, author=1, since=8))
    assert view.age_s == float("inf")


def test_a_manager_that_knows_nothing_yet_changes_nothing_and_is_told_the_table_it_asks_for() -> (
    None
):
    clock = ManualClock()
    view = TableView(clock, ttl_s=30.0)
    view.offer(full(7))
    assert view.take_report().table is None
    clock.advance(2.0)
    assert not view.offer(TableUpdate(asks_table=True))
    assert view.table.epoch == 7 and view.age_s == 2.0
    assert view.take_report().table is view.table
    clock.advance(30.0)
    assert view.take_report().table is None, "the reader has asked the registry meanwhile"


def test_what_was_recorded_is_handed_over_once_unless_it_reached_nobody() -> None:
    view = TableView(ManualClock())
    view.record(ONE, 10.0)
    view.record(ONE, 5.0)
    view.record_lost("a")
    report = view.take_report()
    assert report.demand == {ONE: DemandSample(2, 15.0)} and report.lost == {"a"}
    assert (view.take_report().demand, view.take_report().lost) == ({}, frozenset())
    view.record(ONE, 1.0)
    view.give_back(report)
    again = view.take_report()
    assert again.demand == {ONE: DemandSample(3, 16.0)} and again.lost == {"a"}
