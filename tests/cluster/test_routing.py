"""The order in which a request tries the replicas."""

from __future__ import annotations

import heapq
import random
from collections import Counter
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


def test_an_adapter_nobody_holds_goes_to_one_place_among_the_idle() -> None:
    """So that routers that have not heard of each other's choice yet make the same."""
    candidates = ["a", "b", "c"]
    table = PlacementTable(replicas={name: IDLE for name in candidates})
    assert Routing(ManualClock()).order(ONE, candidates, table) == preference(ONE, candidates)


def test_an_adapter_nobody_holds_goes_where_least_has_been_done() -> None:
    candidates = ["a", "b", "c"]
    clock = ManualClock()
    routing = Routing(clock)
    table = PlacementTable(replicas={name: IDLE for name in candidates})
    for number, replica_id in enumerate(["a", "c", "a", "b", "c"]):
        routing.best(None, candidates, table)
        routing.choose(str(number), replica_id, 1.0)
        clock.advance(1.0)
        routing.finish(str(number))
    assert routing.order(ONE, candidates, table)[0] == "b"


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


def test_a_request_that_was_turned_away_counts_nowhere_and_is_known_until_it_ends() -> None:
    clock = ManualClock()
    routing = Routing(clock)
    table = PlacementTable(replicas=loads({"a": 0.0, "b": 0.0}))
    routing.choose("one", "a", 50.0)
    routing.reject("one")
    assert routing.order(None, ["a", "b"], table) == ["a", "b"] and routing.is_chosen("one")
    routing.choose("one", "b", 50.0)
    routing.finish("one")
    assert not routing.is_chosen("one")
    routing.reject("one")
    assert not routing.is_chosen("one"), "told too late"


def full(slots: int = 4, waiting: int = 0) -> ReplicaLoad:
    return ReplicaLoad(num_running=slots, num_waiting=waiting, slots=slots, load_s=0.1)


IDLE = ReplicaLoad(slots=4, load_s=0.1)


def test_a_holder_that_is_full_gives_way_to_one_that_has_the_adapter_by_chance() -> None:
    table = PlacementTable(
        holders={ONE: ("a",)}, residents={ONE: ("a", "b")}, replicas={"a": full(), "b": IDLE}
    )
    assert Routing(ManualClock()).order(ONE, ["a", "b"], table) == ["b", "a"]


def test_a_short_queue_is_better_than_a_load_and_a_load_better_than_a_long_queue() -> None:
    for waiting, expected in ((1, "a"), (1000, "b")):
        table = PlacementTable(
            holders={ONE: ("a",)},
            residents={ONE: ("a",)},
            replicas={"a": full(waiting=waiting), "b": IDLE},
        )
        assert Routing(ManualClock()).best(ONE, ["a", "b"], table) == [expected]


def test_a_crowd_that_finds_everybody_full_spreads_before_the_next_view() -> None:
    table = PlacementTable(
        holders={ONE: ("a",)},
        residents={ONE: ("a",)},
        replicas={"a": full(waiting=8), "b": IDLE, "c": IDLE},
    )
    routing = Routing(ManualClock())
    chosen = set()
    for number in range(12):
        [best] = routing.best(ONE, ["a", "b", "c"], table)
        routing.choose(str(number), best, 1.0)
        chosen.add(best)
    assert chosen >= {"b", "c"}


def test_a_cold_adapter_is_sent_where_it_was_sent_a_moment_ago() -> None:
    table = PlacementTable(replicas={name: IDLE for name in "abc"})
    routing = Routing(ManualClock())
    [first] = routing.best(ONE, ["a", "b", "c"], table)
    routing.choose("one", first, 1000.0)
    assert routing.best(ONE, ["a", "b", "c"], table) == [first]


def test_requests_that_end_leave_their_slots_free_without_waiting_for_a_heartbeat() -> None:
    table = PlacementTable(
        holders={ONE: ("a",)}, residents={ONE: ("a", "b")}, replicas={"a": IDLE, "b": IDLE}
    )
    routing = Routing(ManualClock())
    for number in range(4):
        routing.choose(str(number), "a", 1.0)
    assert routing.best(ONE, ["a", "b"], table) == ["b"]
    routing.finish("0")
    assert routing.best(ONE, ["a", "b"], table) == ["a"]


def test_what_requests_took_counts_not_what_they_were_taken_for() -> None:
    clock = ManualClock()
    table = PlacementTable(
        holders={ONE: ("a", "b")}, residents={ONE: ("a", "b")}, replicas={"a": IDLE, "b": IDLE}
    )
    routing = Routing(clock)
    for name in "ab":
        routing.best(ONE, ["a", "b"], table)
        routing.choose(name, name, 10.0)
    clock.advance(0.2)
    routing.finish("b")
    clock.advance(2.0)
    routing.finish("a")
    table = replace(table, replicas=dict(table.replicas))
    assert routing.best(ONE, ["a", "b"], table) == ["b"]


def test_who_was_busy_for_long_gives_way_to_who_is_busy_just_now() -> None:
    clock = ManualClock()
    table = PlacementTable(
        holders={ONE: ("a", "b")}, residents={ONE: ("a", "b")}, replicas={"a": IDLE, "b": IDLE}
    )
    routing = Routing(clock)
    for number in range(30):
        table = replace(table, replicas=dict(table.replicas))
        routing.best(ONE, ["a", "b"], table)
        routing.choose(str(number), "a", 10.0)
        clock.advance(0.5)
        routing.finish(str(number))
    routing.choose("just now", "b", 10.0)
    table = replace(table, replicas=dict(table.replicas))
    assert routing.best(ONE, ["a", "b"], table) == ["b"]


def test_a_replica_that_has_just_come_queues_no_more_than_the_others() -> None:
    clock = ManualClock()
    routing = Routing(clock)
    table = PlacementTable(replicas={name: IDLE for name in "ab"})
    for number in range(40):
        routing.order(None, ["a", "b"], table)
        routing.choose(f"before {number}", "ab"[number % 2], 1.0)
        clock.advance(0.5)
        routing.finish(f"before {number}")
        table = replace(table, replicas=dict(table.replicas))
    table = PlacementTable(replicas={name: IDLE for name in "abc"})
    for version in (None, ONE):
        sent = Counter()
        for number in range(24):
            (best, *_) = routing.order(version, ["a", "b", "c"], table)
            routing.choose(f"{version} {number}", best, 1.0)
            routing._coming.clear()
            sent[best] += 1
        assert sent == {"a": 8, "b": 8, "c": 8}


def test_the_end_of_a_long_stream_does_not_count_as_work_of_just_now() -> None:
    clock = ManualClock()
    routing = Routing(clock, random.Random(1))
    routing.choose("long", "a", 1.0)
    running = Counter(["a"])
    ends = [(clock.now_s + 120.0, "long", "a")]
    to_a = 0
    for number in range(20 * 130):  # 20 requests of a second each, every second
        while ends[0][0] <= clock.now_s:
            _, name, replica_id = heapq.heappop(ends)
            routing.finish(name)
            running[replica_id] -= 1
        if number % 10 == 0:
            table = PlacementTable(
                replicas={one: ReplicaLoad(running[one], slots=64, load_s=0.1) for one in "abcd"}
            )
        (best, *_) = routing.order(None, "abcd", table)
        routing.choose(str(number), best, 1.0)
        running[best] += 1
        heapq.heappush(ends, (clock.now_s + 1.0, str(number), best))
        to_a += best == "a" and number >= 20 * 120
        clock.advance(0.05)
    assert 35 <= to_a <= 65, "of the 200 after its end, for one of four"
