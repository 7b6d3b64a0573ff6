"""A replica that fails what it is asked gets a request now and then; all others get the rest."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.failing_replicas import (
    FIRST_PAUSE_S,
    FORGOTTEN_S,
    LONGEST_PAUSE_S,
    FailingReplicas,
    Outcome,
)
from cluster.routing import Routing
from cluster.table import PlacementTable, ReplicaLoad
from storage.identity import AdapterVersion
from tests.cluster.clocks import ManualClock

ONE = AdapterVersion("1" * 64)
REPLICAS = ("a", "b", "c", "d")


class Traffic:
    """40 requests a second for four replicas; a good one takes 0.2 s for each, a broken one no time."""

    def __init__(self, version: AdapterVersion | None) -> None:
        self.clock = ManualClock()
        self.routing = Routing(self.clock, random.Random(1))
        self._version = version
        self._running: Counter[str] = Counter()
        self._ends: list[tuple[float, str, str]] = []
        self._number = 0

    def run(self, seconds: float, is_broken: Callable[[str], bool]) -> Counter[str]:
        """How many requests each replica was sent."""
        sent: Counter[str] = Counter()
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s:
            if self._number % 20 == 0:
                loads = {r: ReplicaLoad(self._running[r], slots=16, load_s=0.1) for r in REPLICAS}
                held = {ONE: REPLICAS}
                self._table = PlacementTable(holders=held, residents=held, replicas=loads)
            while self._ends and self._ends[0][0] <= self.clock.now_s:
                _, name, replica_id = heapq.heappop(self._ends)
                self._running[replica_id] -= 1
                self.routing.finish(name)
                self.routing.hear(replica_id, Outcome.ANSWERED)
            self._send(sent, is_broken)
            self.clock.advance(1 / 40)
        return sent

    def _send(self, sent: Counter[str], is_broken: Callable[[str], bool]) -> None:
        self._number += 1
        name = str(self._number)
        replica_id, *others = self.routing.order(self._version, REPLICAS, self._table)
        assert sorted((replica_id, *others)) == list(REPLICAS)
        self.routing.choose(name, replica_id, 10.0)
        sent[replica_id] += 1
        if is_broken(replica_id):
            self.routing.finish(name)
            self.routing.hear(replica_id, Outcome.FAILED)
        else:
            self._running[replica_id] += 1
            heapq.heappush(self._ends, (self.clock.now_s + 0.2, name, replica_id))


def nobody(replica_id: str) -> bool:
    return False


def everybody(replica_id: str) -> bool:
    return True


@pytest.mark.parametrize("version", [None, ONE])
def test_one_broken_of_four_is_only_tried_now_and_then_and_comes_back_when_it_is_well(
    version: AdapterVersion | None,
) -> None:
    traffic = Traffic(version)
    traffic.run(30.0, nobody)
    sent = traffic.run(30.0, lambda replica_id: replica_id == "b")
    assert 1 <= sent["b"] <= 0.01 * sent.total()
    traffic.run(LONGEST_PAUSE_S, nobody)
    sent = traffic.run(30.0, nobody)
    assert 0.15 * sent.total() <= sent["b"] <= 0.35 * sent.total()


@pytest.mark.parametrize("version", [None, ONE])
@pytest.mark.parametrize("good_s", [0.0, 30.0])
def test_when_all_fail_each_gets_its_part(version: AdapterVersion | None, good_s: float) -> None:
    traffic = Traffic(version)
    traffic.run(good_s, nobody)
    sent = traffic.run(30.0, everybody)
    assert all(0.2 * sent.total() <= sent[one] <= 0.3 * sent.total() for one in REPLICAS)


def paused(failing: FailingReplicas) -> set[str]:
    return set(REPLICAS) - set(failing.sound(REPLICAS))


def test_pauses_double_until_the_longest_with_one_request_after_each() -> None:
    clock = ManualClock()
    failing = FailingReplicas(clock)
    failing.hear("a", Outcome.FAILED)
    pauses = [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(8)]
    assert pauses[-2:] == [LONGEST_PAUSE_S] * 2
    for pause_s in pauses:
        failing.hear("a", Outcome.FAILED)  # was there when the pause began
        clock.advance(0.75 * pause_s)
        assert paused(failing) == {"a"}
        clock.advance(0.25 * pause_s)
        assert paused(failing) == set()
        failing.send("a")
        assert paused(failing) == {"a"}, "until there is word of the one"
        failing.hear("a", Outcome.FAILED)


def test_a_request_without_an_outcome_is_followed_by_another() -> None:
    clock = ManualClock()
    failing = FailingReplicas(clock)
    failing.hear("a", Outcome.FAILED)
    for _ in range(3):
        clock.advance(FIRST_PAUSE_S)
        assert paused(failing) == set()
        failing.send("a")
        assert paused(failing) == {"a"}


def second_pause_s(after: Callable[[FailingReplicas, ManualClock], None]) -> float:
    clock = ManualClock()
    failing = FailingReplicas(clock)
    failing.hear("a", Outcome.FAILED)
    after(failing, clock)
    assert paused(failing) == set()
    failing.hear("a", Outcome.FAILED)
    begun_s = clock.now_s
    while paused(failing):
        clock.advance(0.25)
    return clock.now_s - begun_s


def test_what_begins_ends_a_pause_and_what_ends_well_makes_the_next_short() -> None:
    first, second = FIRST_PAUSE_S, 2 * FIRST_PAUSE_S
    assert second_pause_s(lambda failing, _: failing.hear("a", Outcome.BEGUN)) == second
    assert second_pause_s(lambda failing, _: failing.hear("a", Outcome.ANSWERED)) == first
    assert second_pause_s(lambda _, clock: clock.advance(first)) == second

    def wait(failing: FailingReplicas, clock: ManualClock) -> None:
        clock.advance(FIRST_PAUSE_S + FORGOTTEN_S)

    assert second_pause_s(wait) == first


@given(
    st.lists(
        st.tuples(
            st.sampled_from(REPLICAS),
            st.sampled_from([*Outcome, "sent"]),
            st.floats(0.0, 2 * LONGEST_PAUSE_S),
        )
    )
)
def test_somebody_can_always_be_sent_to_and_nobody_is_left_out_for_longer_than_a_pause(
    told: list[tuple[str, str, float]],
) -> None:
    clock = ManualClock()
    failing = FailingReplicas(clock)
    for replica_id, what, seconds in told:
        if what == "sent":
            failing.send(replica_id)
        else:
            failing.hear(replica_id, Outcome(what))
        assert failing.sound(REPLICAS) and set(failing.sound(REPLICAS)) <= set(REPLICAS)
        clock.advance(seconds)
    clock.advance(LONGEST_PAUSE_S)
    assert set(failing.sound(REPLICAS)) == set(REPLICAS)
