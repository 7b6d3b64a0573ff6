"""Placement's promises, driven by hypothesis with random adapters, replicas and histories."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ClusterSettings
from cluster.placement import Placement, ReplicaSpace, WantedAdapter
from cluster.placing import HOLDER_SLACK, copies_wanted, place
from cluster.planned_replica import MOVES_PER_TICK, Budget, PlannedReplica
from cluster.rendezvous import Rankings, preference, weight
from storage.identity import AdapterVersion, sha256_hex

SETTINGS = ClusterSettings()


def version(index: int) -> AdapterVersion:
    return AdapterVersion(sha256_hex(f"adapter {index}".encode()))


def adapter(index: int, rows: int = 1, work: float = 1.0, copies: int = 1) -> WantedAdapter:
    return WantedAdapter(version(index), rows, work, copies, requests=work)


def spaces(count: int, rows: int) -> list[ReplicaSpace]:
    return [ReplicaSpace(f"replica-{index}", rows) for index in range(count)]


adapters = st.lists(
    st.tuples(st.integers(0, 24), st.floats(0.01, 100.0), st.integers(1, 4)), max_size=20
).map(lambda drawn: [adapter(i, *values) for i, values in enumerate(drawn)])
replicas = st.lists(st.integers(0, 24), max_size=6).map(
    lambda rows: [ReplicaSpace(f"replica-{i}", r) for i, r in enumerate(rows)]
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[WantedAdapter], list[ReplicaSpace], Placement]:
    """Adapters, replicas with some of them resident, and a previous plan that may name replicas long gone."""
    wanted, empty = draw(adapters), draw(replicas)
    names = [f"replica-{index}" for index in range(8)]
    some = st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)
    holders = {item.version: tuple(draw(some)) for item in wanted if draw(st.booleans())}
    pairs = [(v, r) for v, held in holders.items() for r in held]
    prefetch = frozenset(pair for pair in pairs if draw(st.booleans()))
    filled = [
        replace(
            space,
            resident=frozenset(item.version for item in wanted if draw(st.booleans())),
        )
        for space in empty
    ]
    return wanted, filled, Placement(holders, prefetch)


def rows_of(plan: Placement, wanted: list[WantedAdapter]) -> dict[str, int]:
    used: dict[str, int] = {}
    for item in wanted:
        for replica_id in plan.holders.get(item.version, ()):
            used[replica_id] = used.get(replica_id, 0) + item.rows
    return used


def planned_rows(space: ReplicaSpace, wanted: list[WantedAdapter], live: list[ReplicaSpace]) -> int:
    largest = max(each.rows for each in live)
    rows = [item.rows for item in wanted if item.rows <= largest]
    return PlannedReplica(space, SETTINGS.pinned_fraction, sum(rows) / len(rows)).rows_left


def load_of(plan: Placement, wanted: list[WantedAdapter]) -> dict[str, float]:
    load: dict[str, float] = {}
    for item in wanted:
        for replica_id in plan.holders.get(item.version, ()):
            load[replica_id] = load.get(replica_id, 0.0) + item.share
    return load


@given(situations())
def test_no_replica_is_planned_over_its_rows(situation) -> None:
    wanted, live, previous = situation
    plan = place(wanted, live, previous, SETTINGS)
    capacity = {space.replica_id: space.rows for space in live}
    for replica_id, used in rows_of(plan, wanted).items():
        assert used <= capacity[replica_id]


@given(situations())
def test_every_adapter_is_placed_or_named_and_who_is_left_out_fits_nowhere(situation) -> None:
    wanted, live, previous = situation
    plan = place(wanted, live, previous, SETTINGS)
    assert sorted([*plan.holders, *plan.too_large, *plan.no_room]) == sorted(
        item.version for item in wanted
    )
    used = rows_of(plan, wanted)
    by_version = {item.version: item for item in wanted}
    for left_out in plan.too_large:
        assert all(by_version[left_out].rows > space.rows for space in live)
    for left_out in plan.no_room:
        for space in live:
            budget = planned_rows(space, wanted, live)
            assert used.get(space.replica_id, 0) + by_version[left_out].rows > budget


@given(situations())
def test_an_adapter_has_at_most_its_copies_each_on_another_replica(situation) -> None:
    wanted, live, previous = situation
    plan = place(wanted, live, previous, SETTINGS)
    for item in wanted:
        holders = plan.holders.get(item.version, ())
        assert len(set(holders)) == len(holders) <= item.copies


@given(situations(), st.randoms())
def test_the_plan_depends_on_nothing_but_its_inputs(situation, rng: random.Random) -> None:
    wanted, live, previous = situation
    plan = place(wanted, live, previous, SETTINGS)
    rng.shuffle(wanted)
    rng.shuffle(live)
    assert place(wanted, live, previous, SETTINGS) == plan


@given(situations(), st.integers(1, 5))
def test_new_prefetches_stay_within_the_loads_of_a_tick(situation, limit: int) -> None:
    wanted, live, previous = situation
    few = ClusterSettings(max_loads_per_tick=limit)
    plan = place(wanted, live, previous, few)
    resident = {(v, space.replica_id) for space in live for v in space.resident}
    assert len(plan.prefetch - previous.prefetch) <= limit
    assert not plan.prefetch & resident
    assert all(replica_id in plan.holders[v] for v, replica_id in plan.prefetch)


@settings(max_examples=30)
@given(st.lists(situations(), min_size=1, max_size=3))
def test_a_budget_refilled_by_whole_ticks_changes_no_plan(several) -> None:
    budget = Budget(SETTINGS.max_loads_per_tick)
    for wanted, live, previous in several:
        budget.refill(1.0 - 1e-12, SETTINGS.max_loads_per_tick)
        plan = place(wanted, live, previous, SETTINGS, budget=budget)
        assert plan == place(wanted, live, previous, SETTINGS)


@given(situations(), st.integers(0, 400))
def test_no_replica_is_planned_over_its_bytes(situation, num_bytes: int) -> None:
    wanted, live, previous = situation
    wanted = [replace(item, num_bytes=10 * item.rows) for item in wanted]
    live = [replace(space, num_bytes=num_bytes) for space in live]
    plan = place(wanted, live, previous, SETTINGS)
    assert all(10 * used <= num_bytes for used in rows_of(plan, wanted).values())


@given(situations())
def test_a_plan_made_again_of_what_it_was_made_of_is_the_same(situation) -> None:
    wanted, live, previous = situation
    rankings = Rankings()
    first = place(wanted, live, previous, SETTINGS, rankings)
    assert place(wanted, live, previous, SETTINGS, rankings) == first


@given(adapters, st.integers(1, 6))
def test_single_copies_are_spread_within_the_load_bound(wanted, count: int) -> None:
    wanted = [replace(item, copies=1) for item in wanted]
    plan = place(wanted, spaces(count, rows=10_000), Placement(), SETTINGS)
    mean = sum(item.work for item in wanted) / count
    heaviest = max((item.share for item in wanted), default=0.0)
    for load in load_of(plan, wanted).values():
        assert load <= max(SETTINGS.load_slack * mean, mean + heaviest) * (1 + 1e-9)


@given(adapters, st.integers(2, 6), st.integers(0, 5))
def test_when_a_replica_leaves_only_its_own_adapters_move(wanted, count: int, who: int) -> None:
    wanted = [replace(item, copies=1) for item in wanted]
    before = place(wanted, spaces(count, rows=10_000), Placement(), SETTINGS)
    left = [s for s in spaces(count, rows=10_000) if s.replica_id != f"replica-{who % count}"]
    after = place(wanted, left, before, SETTINGS)
    gone = f"replica-{who % count}"
    moved = [
        v for v, held in before.holders.items() if gone not in held and after.holders[v] != held
    ]
    # A replica far above the mean gives some of its load to the others, as in any tick.
    mean = sum(item.work for item in wanted) / len(left)
    overloaded = {r for r, load in load_of(before, wanted).items() if load > HOLDER_SLACK * mean}
    moved = [v for v in moved if not overloaded.intersection(before.holders[v])]
    assert len(moved) <= MOVES_PER_TICK


@given(adapters, st.integers(2, 6))
def test_a_replica_that_joins_takes_a_few_adapters_and_moves_no_others(wanted, count) -> None:
    wanted = [replace(item, copies=1, work=1.0) for item in wanted]
    live = spaces(count, rows=10_000)
    before = place(wanted, live, Placement(), SETTINGS)
    joined = [*live, ReplicaSpace("joiner", 10_000)]
    after = place(wanted, joined, before, SETTINGS)
    moved = [v for v in before.holders if after.holders[v] != before.holders[v]]
    assert len(moved) <= MOVES_PER_TICK
    assert all(after.holders[v] == ("joiner",) for v in moved)


def test_a_plan_that_nothing_disturbs_stays_as_it_is() -> None:
    rng = random.Random(1)
    wanted = [
        adapter(i, rng.randint(1, 8), rng.uniform(1, 9), rng.choice([1, 1, 3])) for i in range(40)
    ]
    live = spaces(4, rows=80)
    plan = place(wanted, live, Placement(), SETTINGS)
    for _ in range(60):  # rebalancing may go on for some ticks, then it must end
        plan = place(wanted, live, plan, SETTINGS)
    assert place(wanted, live, plan, SETTINGS) == plan


def test_residents_stay_where_they_are_when_the_plan_was_lost() -> None:
    wanted = [adapter(index, copies=1) for index in range(8)]
    live = spaces(4, rows=100)
    first = place(wanted, live, Placement(), SETTINGS)
    loaded = [
        replace(
            space,
            resident=frozenset(v for v, held in first.holders.items() if space.replica_id in held),
        )
        for space in live
    ]
    assert place(wanted, loaded, Placement(), SETTINGS).holders == first.holders


def test_a_hot_adapter_is_prefetched_on_several_replicas_and_a_cold_one_on_none() -> None:
    hot, cold = adapter(0, rows=2, work=90.0, copies=3), adapter(1, rows=2, work=1.0)
    plan = place([hot, cold], spaces(3, rows=10), Placement(), SETTINGS)
    assert len(plan.holders[hot.version]) == 3
    assert {v for v, _ in plan.prefetch} == {hot.version}
    assert len(plan.holders[cold.version]) == 1


def test_rows_go_to_those_who_use_them_most() -> None:
    thin, fat = adapter(0, rows=1, work=10.0), adapter(1, rows=8, work=12.0)
    plan = place([thin, fat], spaces(1, rows=8), Placement(), SETTINGS)
    assert plan.holders == {thin.version: ("replica-0",)}
    assert plan.no_room == (fat.version,)


def test_an_adapter_larger_than_the_planned_part_may_have_a_bank_to_itself() -> None:
    alone = adapter(0, rows=10)
    plan = place([alone], spaces(1, rows=10), Placement(), SETTINGS)
    assert plan.holders == {alone.version: ("replica-0",)}


def test_without_replicas_everything_is_left_out_by_name() -> None:
    plan = place([adapter(0)], [], Placement(), SETTINGS)
    assert plan.holders == {} and plan.too_large == (version(0),)


@pytest.mark.parametrize(
    ("work", "expected"), [(0.0, 1), (1.0, 1), (15.0, 1), (16.0, 2), (100.0, 7), (400.0, 8)]
)
def test_one_more_holder_for_each_share_of_a_replicas_part(work: float, expected: int) -> None:
    assert copies_wanted(work, total_work=800.0, num_replicas=8, share=0.15) == expected


def test_preference_is_the_same_everywhere_and_ignores_who_else_is_there() -> None:
    assert weight(AdapterVersion("a" * 64), "replica-1") == 17858903706003156454
    names = [f"replica-{index}" for index in range(10)]
    order = preference(version(3), names)
    assert preference(version(3), reversed(names)) == order
    assert preference(version(3), names[:5]) == [name for name in order if name in names[:5]]


def test_what_a_replica_could_not_load_is_planned_elsewhere() -> None:
    item = adapter(1, copies=2)
    first, second, third = preference(item.version, ["replica-0", "replica-1", "replica-2"])
    live = [
        replace(space, unfit=frozenset([item.version])) if space.replica_id == first else space
        for space in spaces(3, rows=4)
    ]
    plan = place([item], live, Placement({item.version: (first,)}), SETTINGS)
    assert set(plan.holders[item.version]) == {second, third}


def test_a_reserved_version_has_its_rows_before_any_that_is_asked_for() -> None:
    kept = WantedAdapter(version(1), rows=3, work=0.0, is_reserved=True)
    hot = adapter(2, rows=3, work=100.0)
    plan = place([hot, kept], spaces(1, rows=4), Placement({hot.version: ("replica-0",)}), SETTINGS)
    assert plan.holders == {kept.version: ("replica-0",)} and plan.no_room == (hot.version,)


def test_a_holder_too_many_is_given_up_where_the_load_is_greatest() -> None:
    shared, heavy = adapter(0, work=2.0, copies=1), adapter(1, work=9.0)
    live = [replace(space, resident=frozenset([shared.version])) for space in spaces(2, rows=100)]
    before = Placement({shared.version: ("replica-0", "replica-1"), heavy.version: ("replica-0",)})
    plan = place([shared, heavy], live, before, SETTINGS)
    assert plan.holders[shared.version] == ("replica-1",)


@pytest.mark.parametrize(
    ("rows", "sizes", "planned"),
    [(100, (1,), 90), (800, (1, 31), 640), (64, (16,), 48), (8, (1,), 6)],
)
def test_a_plan_leaves_room_for_ten_adapters_that_come_by_chance(
    rows: int, sizes: tuple[int, ...], planned: int
) -> None:
    """At least a tenth of a bank, at most a quarter."""
    (space,) = spaces(1, rows=rows)
    wanted = [adapter(index, rows=sizes[index % len(sizes)]) for index in range(2 * rows)]
    plan = place(wanted, [space], Placement(), SETTINGS)
    assert sum(rows_of(plan, wanted).values()) == planned


def test_an_adapter_is_planned_where_it_is_rather_than_where_it_was_to_be() -> None:
    item = adapter(1)
    live = spaces(3, rows=10)
    live[2] = replace(live[2], resident=frozenset([item.version]))
    plan = place([item], live, Placement({item.version: ("replica-0",)}), SETTINGS)
    assert plan.holders[item.version] == ("replica-2",) and not plan.prefetch


def test_a_hot_adapter_moves_where_cold_ones_fill_the_rows_and_none_of_them_is_forgotten() -> None:
    hot = [adapter(index, work=10.0) for index in range(4)]
    cold = [adapter(index, work=0.1) for index in range(4, 16)]
    live = [
        replace(space, resident=frozenset(item.version for item in items))
        for space, items in zip(spaces(2, rows=10), (hot, cold[:8]), strict=True)
    ]
    before = Placement(
        {item.version: ("replica-0",) for item in hot}
        | {item.version: ("replica-1",) for item in cold[:8]}
    )
    plan = place([*hot, *cold], live, before, SETTINGS)
    moved = [item for item in hot if plan.holders[item.version] == ("replica-1",)]
    assert len(moved) == 2
    assert {(item.version, "replica-1") for item in moved} == plan.prefetch
    assert all(item.version in plan.holders or item.version in plan.no_room for item in cold)
    assert sum(rows_of(plan, [*hot, *cold]).values()) == 14


def test_no_move_takes_the_rows_of_what_is_worth_more_or_reserved() -> None:
    wide = [adapter(index, rows=4, work=10.0) for index in range(2)]
    worthy = [adapter(index, work=3.0) for index in range(2, 5)]
    kept = WantedAdapter(version(9), rows=1, work=0.0, is_reserved=True)
    live = [
        replace(space, resident=frozenset(item.version for item in items))
        for space, items in zip(spaces(2, rows=11), (wide, [*worthy, kept]), strict=True)
    ]
    live[1] = replace(live[1], rows=6)
    before = Placement(
        {item.version: ("replica-0",) for item in wide}
        | {item.version: ("replica-1",) for item in (*worthy, kept)}
    )
    plan = place([*wide, *worthy, kept], live, before, SETTINGS)
    assert plan.holders == before.holders
