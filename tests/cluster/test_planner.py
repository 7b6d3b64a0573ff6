"""What the planner remembers from tick to tick."""

from __future__ import annotations

import pytest

from cluster.config import ClusterSettings
from cluster.placement import ReplicaSpace
from cluster.planned_replica import MOVES_PER_TICK
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


@pytest.mark.parametrize("pause_s", [0.05, 0.7, 3.0])
def test_however_often_plans_are_made_loads_are_ordered_at_one_pace(
    clock: ManualClock, pause_s: float
) -> None:
    settings = ClusterSettings(max_loads_per_tick=6)
    planner = PlacementPlanner(settings, clock)
    versions = [AdapterVersion(f"{number:064x}") for number in range(60)]
    known = dict.fromkeys(versions, AdapterFacts(rows=1, num_bytes=1))
    banks = [ReplicaSpace(name, rows=200) for name in "ab"]
    began_s, ordered = clock.now_s, 0
    while clock.now_s < began_s + 5 * settings.tick_s + 0.01:
        plan = planner.plan(banks, known, [Reservation(each, copies=1) for each in versions])
        ticks = (clock.now_s - began_s) / settings.tick_s
        assert len(plan.prefetch) <= 6 * (1 + ticks) + 1
        clock.advance(pause_s)
        ordered = len(plan.prefetch)
    assert ordered >= 6 * 5


def test_however_often_plans_are_made_adapters_are_moved_at_one_pace(
    planner: PlacementPlanner, clock: ManualClock
) -> None:
    versions = [AdapterVersion(f"{number:064x}") for number in range(30)]
    known = dict.fromkeys(versions, AdapterFacts(rows=1, num_bytes=1))
    planner.observe(dict.fromkeys(versions, DemandSample(10, 100.0)))
    banks = [ReplicaSpace(name, rows=200) for name in "ab"]
    before = planner.plan(banks, known).holders
    banks.append(ReplicaSpace("c", rows=200))
    clock.advance(3.0)
    for _ in range(3):
        after = planner.plan(banks, known).holders
        assert sum(after[each] != before[each] for each in versions) == MOVES_PER_TICK
    clock.advance(3.0)
    after = planner.plan(banks, known).holders
    assert sum(after[each] != before[each] for each in versions) == 2 * MOVES_PER_TICK


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
