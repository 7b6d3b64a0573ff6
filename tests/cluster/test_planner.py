"""What the planner remembers from tick to tick."""

from __future__ import annotations

import pytest

from cluster.config import ClusterSettings
from cluster.placement import ReplicaSpace
from cluster.planner import PlacementPlanner, Reservation
from cluster.table import AdapterFacts, DemandSample
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE, TWO = AdapterVersion("1" * 64), AdapterVersion("2" * 64)
FACTS = {each: AdapterFacts(rows=2, num_bytes=100) for each in (ONE, TWO)}
SPACES = [ReplicaSpace(name, rows=16) for name in "abc"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def planner(clock: ManualClock) -> PlacementPlanner:
    return PlacementPlanner(ClusterSettings(), clock)


def test_a_hot_adapter_grows_at_once_and_shrinks_only_after_its_cooldown(
    planner: PlacementPlanner, clock: ManualClock
) -> None:
    planner.observe({ONE: DemandSample(10, 1000.0)})
    assert len(planner.plan(SPACES, FACTS).holders[ONE]) == 3
    planner.observe({TWO: DemandSample(10_000, 1e6)})
    for _ in range(20):  # however often it is asked meanwhile
        assert len(planner.plan(SPACES, FACTS).holders[ONE]) == 3
    clock.advance(29.0)
    assert len(planner.plan(SPACES, FACTS).holders[ONE]) == 3
    clock.advance(1.0)
    assert len(planner.plan(SPACES, FACTS).holders[ONE]) == 1


def test_only_published_versions_are_planned(planner: PlacementPlanner) -> None:
    planner.observe({ONE: DemandSample(10, 1000.0)})
    assert planner.plan(SPACES, {}).holders == {}


def test_a_reserved_version_is_loaded_on_as_many_replicas_as_reserved_though_nobody_asks(
    planner: PlacementPlanner,
) -> None:
    plan = planner.plan(SPACES, FACTS, [Reservation(ONE, copies=2)])
    assert len(plan.holders[ONE]) == 2
    assert plan.prefetch == {(ONE, replica_id) for replica_id in plan.holders[ONE]}
    assert planner.plan(SPACES, FACTS).holders == {}


def test_a_successor_is_loaded_where_its_predecessor_is_and_inherits_its_place(
    planner: PlacementPlanner,
) -> None:
    planner.observe({ONE: DemandSample(10, 1000.0)})
    before = planner.plan(SPACES, FACTS).holders[ONE]
    plan = planner.plan(SPACES, FACTS, [Reservation(TWO, replaces=ONE)])
    assert plan.holders == {ONE: before, TWO: before}
    planner.inherit(ONE, TWO, work_ratio=1.0)
    assert planner.plan(SPACES, FACTS).holders == {TWO: before}
