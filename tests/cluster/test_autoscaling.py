"""How many replicas: quick to add, slow and careful to take away."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.autoscaling import Autoscaler, ReplicaSignals, Scale
from cluster.config import AutoscalingSettings
from tests.cluster.clocks import ManualClock

SETTINGS = AutoscalingSettings(
    up_delay_s=3.0, down_delay_s=60.0, settle_s=30.0, stale_after_s=10.0, shrink_below=0.7
)
IDLE = ReplicaSignals()
LEAST, MOST = 1, 4


class Cluster:
    """Replicas that report once a second and do at once what is decided."""

    def __init__(self, settings: AutoscalingSettings = SETTINGS, count: int = 1) -> None:
        self.clock = ManualClock()
        self.scaler = Autoscaler(settings, self.clock)
        self.count = count
        self.is_prepared = True
        self.silent: frozenset[str] = frozenset()
        self.last = Scale(count)

    @property
    def running(self) -> list[str]:
        return [f"r{number}" for number in range(self.count)]

    def second(self, signals: ReplicaSignals) -> int:
        """One second in which every replica reports the same."""
        self.clock.advance(1.0)
        for replica_id in self.running:
            if replica_id not in self.silent:
                self.scaler.report(replica_id, signals, self.clock.now_s)
        self.last = self.scaler.decide(
            self.running, self.count, LEAST, MOST, is_prepared=self.is_prepared
        )
        self.scaler.check_integrity()
        self.count = self.last.replicas
        return self.count

    def seconds(self, count: int, signals: ReplicaSignals) -> int:
        for _ in range(count):
            self.second(signals)
        return self.count


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        (ReplicaSignals(queue_s=SETTINGS.queue_s * 2.5), 3),
        (ReplicaSignals(queue_s=SETTINGS.queue_s * 100), MOST),
        (ReplicaSignals(kv_used=0.9), 2),
        (ReplicaSignals(kv_used=0.7, queue_s=SETTINGS.queue_s * 1.5), 2),
    ],
)
def test_too_much_of_a_sum_asks_for_as_many_as_bring_it_under_its_target(
    signals: ReplicaSignals, expected: int
) -> None:
    cluster = Cluster()
    assert cluster.seconds(3, signals) == 1, "before the delay has passed"
    assert cluster.second(signals) == expected


@pytest.mark.parametrize(
    "signals", [ReplicaSignals(misses_per_s=50.0), ReplicaSignals(first_token_p99_s=60.0)]
)
def test_misses_and_slow_first_tokens_ask_for_one_more_and_then_wait_for_what_it_brings(
    signals: ReplicaSignals,
) -> None:
    cluster = Cluster()
    sizes = [cluster.second(signals) for _ in range(120)]
    assert sizes[-1] == MOST
    steps = [at for at, (a, b) in enumerate(pairwise(sizes)) if a != b]
    assert all(b - a >= SETTINGS.settle_s for a, b in pairwise(steps))
    assert all(b - a in (0, 1) for a, b in pairwise(sizes))


def test_a_moment_of_much_adds_nothing() -> None:
    cluster = Cluster()
    for _ in range(20):
        assert cluster.seconds(2, ReplicaSignals(queue_s=100.0)) == 1
        assert cluster.second(IDLE) == 1


def test_replicas_leave_one_at_a_time_and_each_after_the_whole_delay() -> None:
    cluster = Cluster(count=4)
    sizes = [cluster.second(IDLE) for _ in range(400)]
    assert sizes[-1] == LEAST
    steps = [at for at, (a, b) in enumerate(pairwise(sizes)) if a != b]
    assert len(steps) == 3
    assert all(b - a >= SETTINGS.down_delay_s for a, b in pairwise(steps))


def test_a_replica_leaves_only_once_placement_is_prepared() -> None:
    cluster = Cluster(count=2)
    cluster.is_prepared = False
    assert cluster.seconds(60, IDLE) == 2 and not cluster.last.wants_fewer
    assert cluster.seconds(500, IDLE) == 2 and cluster.last.wants_fewer
    cluster.is_prepared = True
    assert cluster.second(IDLE) == 1


def test_a_wish_for_fewer_ends_with_the_first_sign_of_load() -> None:
    cluster = Cluster(count=2)
    cluster.is_prepared = False
    cluster.seconds(100, IDLE)
    assert cluster.last.wants_fewer
    cluster.second(ReplicaSignals(kv_used=0.5))
    assert not cluster.last.wants_fewer
    cluster.is_prepared = True
    assert cluster.seconds(59, IDLE) == 2, "the delay began anew"


@pytest.mark.parametrize(
    "signals",
    [
        ReplicaSignals(kv_used=0.3),  # one replica would be at 0.6, above 0.7 of 0.8
        ReplicaSignals(queue_s=SETTINGS.queue_s * 0.4),
        ReplicaSignals(misses_per_s=SETTINGS.misses_per_s * 0.4),
        ReplicaSignals(first_token_p99_s=SETTINGS.first_token_s * 0.8),
    ],
)
def test_whoever_stays_must_be_well_below_every_target(signals: ReplicaSignals) -> None:
    cluster = Cluster(count=2)
    assert cluster.seconds(1000, signals) == 2


def test_a_silent_replica_is_no_idle_one() -> None:
    cluster = Cluster(count=2)
    cluster.silent = frozenset({"r1"})
    assert cluster.seconds(1000, IDLE) == 2
    cluster.silent = frozenset()
    assert cluster.seconds(70, IDLE) == 1


def test_telling_an_old_report_again_makes_it_no_younger() -> None:
    cluster = Cluster(count=2)
    for _ in range(1000):
        cluster.clock.advance(1.0)
        for replica_id in cluster.running:
            cluster.scaler.report(replica_id, IDLE, stamp_s=5.0)
        assert cluster.scaler.decide(cluster.running, 2, 1, 4, is_prepared=True) == Scale(2)


def test_those_who_report_may_ask_for_more_while_another_is_silent() -> None:
    cluster = Cluster(count=2)
    cluster.silent = frozenset({"r1"})
    assert cluster.seconds(4, ReplicaSignals(queue_s=SETTINGS.queue_s * 3)) == 3


def test_a_replica_that_cannot_start_is_given_up_after_the_delay_and_nobody_else_leaves() -> None:
    cluster = Cluster(count=3)
    cluster.seconds(int(SETTINGS.down_delay_s) - 1, ReplicaSignals(kv_used=0.75))
    assert cluster.count == 3
    targets, target = [], 4
    for _ in range(int(SETTINGS.down_delay_s) + 30):
        cluster.clock.advance(1.0)
        for replica_id in cluster.running:
            cluster.scaler.report(replica_id, IDLE, cluster.clock.now_s)
        scale = cluster.scaler.decide(cluster.running, target, 1, 4, is_prepared=False)
        target = scale.replicas
        targets.append(target)
    assert targets == [4] * int(SETTINGS.down_delay_s) + [3] * 30


@pytest.mark.parametrize(
    "signals", [ReplicaSignals(kv_used=0.6), ReplicaSignals(misses_per_s=10.0)]
)
def test_a_replica_that_is_starting_is_waited_for_while_there_is_work_for_it(
    signals: ReplicaSignals,
) -> None:
    cluster = Cluster(count=1)
    for _ in range(1000):
        cluster.clock.advance(1.0)
        cluster.scaler.report("r0", signals, cluster.clock.now_s)
        assert cluster.scaler.decide(["r0"], 2, 1, 2, is_prepared=True) == Scale(2)


def test_bounds_that_moved_are_kept_at_once() -> None:
    cluster = Cluster()
    assert cluster.scaler.decide(["r0"], 1, 2, 4, is_prepared=False).replicas == 2
    assert cluster.scaler.decide(["r0"], 6, 2, 4, is_prepared=False).replicas == 4


def test_stats_that_miss_a_signal_or_are_no_number_are_no_report() -> None:
    whole = ReplicaSignals(1.0, 0.5, 2.0, 3.0)
    assert ReplicaSignals.of_stats({**whole.as_stats(), "other": 1.0}) == whole
    for name in whole.as_stats():
        for bad in (math.nan, math.inf):
            assert ReplicaSignals.of_stats({**whole.as_stats(), name: bad}) is None
        rest = {key: value for key, value in whole.as_stats().items() if key != name}
        assert ReplicaSignals.of_stats(rest) is None


def test_a_report_may_not_be_stale_before_the_next_is_due() -> None:
    with pytest.raises(ValidationError, match="stale_after_s"):
        AutoscalingSettings(report_s=6.0, stale_after_s=10.0)


_AMOUNT = st.floats(0, 20)
_REPORT = st.builds(ReplicaSignals, _AMOUNT, st.floats(0, 1), _AMOUNT, _AMOUNT)
_QUIET = st.builds(ReplicaSignals, st.floats(0, 0.1), st.floats(0, 0.1))


@given(
    st.lists(
        st.tuples(
            st.lists(st.none() | _QUIET | _REPORT, min_size=6, max_size=6),
            st.floats(0.1, 40.0),
            st.booleans(),
            st.integers(-1, 0),
        ),
        max_size=60,
    )
)
def test_whatever_is_reported_the_number_keeps_its_promises(
    moments: list[tuple[list[ReplicaSignals | None], float, bool, int]],
) -> None:
    clock = ManualClock()
    scaler = Autoscaler(SETTINGS, clock)
    target, lowered_s = 2, clock.now_s
    heard_s: dict[str, float] = {}
    for reports, elapsed_s, is_prepared, late in moments:
        clock.advance(elapsed_s)
        running = [f"r{number}" for number in range(max(1, target + late))]
        heard_s = {r: heard_s[r] for r in running if r in heard_s}
        for replica_id, signals in zip(running, reports, strict=False):
            if signals is not None:
                scaler.report(replica_id, signals, clock.now_s)
                heard_s[replica_id] = clock.now_s
        scale = scaler.decide(running, target, LEAST, MOST, is_prepared=is_prepared)
        scaler.check_integrity()
        assert LEAST <= scale.replicas <= MOST
        assert scale == scaler.decide(running, target, LEAST, MOST, is_prepared=is_prepared) or (
            scale.replicas < target  # the wish was granted, and the next one waits as long again
        )
        if scale.replicas < target:
            assert scale.replicas == target - 1
            assert len(running) < target or (len(running) == target and is_prepared)
            assert all(clock.now_s - heard_s[r] <= SETTINGS.stale_after_s for r in running)
            assert clock.now_s - lowered_s >= SETTINGS.down_delay_s
        if scale.replicas != target:
            lowered_s = clock.now_s
        target = scale.replicas


def test_a_simulated_day_is_followed_without_flapping() -> None:
    """Load rises to what 3.2 replicas can do and falls to nothing; new replicas take 40 s to start."""
    settings = AutoscalingSettings()
    clock = ManualClock()
    scaler = Autoscaler(settings, clock)
    capacity = 1000.0  # rank-weighted tokens a replica does per second
    starting: list[float] = []
    running, target = 1, 1
    waiting, worst_wait_s, waited_s, changes, spent_s = 0.0, 0.0, 0.0, 0, 0.0
    day_s = 24 * 3600
    for second in range(day_s):
        clock.advance(1.0)
        arrives = 3.2 * capacity * (0.5 - 0.5 * math.cos(2 * math.pi * second / day_s))
        if second % 3600 < 20:  # a crowd every hour
            arrives += capacity
        busy = min(1.0, (waiting + arrives) / (running * capacity))
        waiting = max(0.0, waiting + arrives - running * capacity)
        wait_s = waiting / (running * capacity)
        worst_wait_s, waited_s = max(worst_wait_s, wait_s), waited_s + (wait_s > 1.0)
        while starting and starting[0] <= clock.now_s:
            running, starting = running + 1, starting[1:]
        names = [f"r{number}" for number in range(running)]
        for name in names:
            scaler.report(name, ReplicaSignals(queue_s=wait_s, kv_used=busy), stamp_s=clock.now_s)
        decided = scaler.decide(names, target, 1, 8, is_prepared=True).replicas
        scaler.check_integrity()
        changes += decided != target
        if decided > target:
            starting += [clock.now_s + 40.0] * (decided - target)
        elif decided < target:
            running -= 1
        target = decided
        spent_s += running
    assert worst_wait_s < 30.0
    assert waited_s < 0.02 * day_s
    assert changes < 80
    assert 1.6 < spent_s / day_s < 4.0, "a mean load of 1.6 replicas"
    assert target <= 2, "the day ends as quietly as it began"
