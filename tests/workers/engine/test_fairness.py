"""Of two that wait all the time, neither gets more than a bounded amount of service ahead of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.identity import AdapterSet
from tests.workers.engine.small_engine import version
from workers.engine.fair_queue import FairQueue
from workers.engine.fairness import VirtualCounters
from workers.engine.request import EngineRequest, SamplingParams
from workers.engine.sequence import Sequence

LARGEST = 30  # work of one request


class CountersMachine(RuleBasedStateMachine):
    """Clients come, go and are served at random; a server that picks the least served is simulated beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counters: VirtualCounters[int] = VirtualCounters(sweep_beyond=2)
        self.waiting: dict[int, int] = {}
        self.running: list[int] = []
        self.level = 0.0

    @rule(client=st.integers(0, 5))
    def join(self, client: int) -> None:
        others = [self.counters.served(other) for other in self.waiting]
        self.counters.join(client)
        if client not in self.waiting and others:
            assert self.counters.served(client) >= min(others)
        self.waiting[client] = self.waiting.get(client, 0) + 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.waiting)))
        self.counters.start(client)
        self.running.append(client)
        self.waiting[client] -= 1
        if not self.waiting[client]:
            del self.waiting[client]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = {one: self.counters.served(one) for one in range(6)}
        forgotten = self.counters.leave(client)
        assert not {*self.waiting, *self.running} & set(forgotten)
        assert all(self.counters.served(one) == max(before[one], self.level) for one in forgotten)

    @rule(client=st.integers(0, 5), work=st.integers(1, LARGEST))
    def serve(self, client: int, work: int) -> None:
        before = self.counters.served(client)
        self.counters.charge(client, work)
        assert self.counters.served(client) == before + work

    @invariant()
    def the_level_never_sinks(self) -> None:
        assert self.counters.check_integrity()
        assert self.counters.level >= self.level
        self.level = self.counters.level


TestCountersMachine = CountersMachine.TestCase
TestCountersMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_one_that_did_not_wait_has_saved_nothing_up() -> None:
    counters: VirtualCounters[str] = VirtualCounters()
    counters.join("busy")
    counters.charge("busy", 1000.0)
    counters.join("newcomer")
    assert counters.served("newcomer") == 1000.0
    counters.start("newcomer")
    counters.start("busy")
    counters.charge("busy", 5.0)
    counters.join("newcomer")
    assert counters.served("newcomer") == 1005.0


def request(number: int, tenant: str, adapter: int, prompt: int, work: float) -> Sequence:
    return Sequence(
        EngineRequest(
            f"r{number}",
            (1,) * prompt,
            SamplingParams(max_tokens=1),
            AdapterSet.of(version(adapter)),
            tenant=tenant,
            work_per_token=work,
        ),
        arrived_s=0.0,
    )


def serve(
    pick: Callable[[FairQueue, list[Sequence]], Iterable[Sequence]],
    weights: dict[tuple[str, int], int],
    seed: int,
    total: float,
) -> dict[tuple[str, int], float]:
    """Serve requests one at a time until `total` work is done; everybody always has requests waiting, the more the
    greater its weight.
    """
    random = Random(seed)
    queue, arrived, number = FairQueue(), list[Sequence](), 0
    served = dict.fromkeys(weights, 0.0)
    while sum(served.values()) < total:
        for (tenant, adapter), weight in weights.items():
            for _ in range(weight + 1 - sum(_who(one) == (tenant, adapter) for one in arrived)):
                work = random.choice([1.0, 2.0, 5.0])
                arrived.append(request(number, tenant, adapter, random.randint(1, 6), work))
                queue.add(arrived[-1])
                number += 1
        one = next(iter(pick(queue, arrived)))
        queue.start(one)
        arrived.remove(one)
        work = one.num_pending * one.request.work_per_token
        queue.charge((one.request.tenant, one.version), work)
        queue.leave(one)
        served[_who(one)] += work
        assert queue.check_integrity()
    return served


def _who(one: Sequence) -> tuple[str, int]:
    return one.request.tenant, int(one.version or "0", 16)


def fair(queue: FairQueue, arrived: list[Sequence]) -> Iterable[Sequence]:
    return queue.in_order({}, ())


def first_come(queue: FairQueue, arrived: list[Sequence]) -> Iterable[Sequence]:
    return arrived


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abc"), st.integers(1, 3)), st.integers(1, 9), min_size=2
    ),
    st.integers(0, 99),
)
def test_nobody_gets_ahead_by_asking_for_more(
    weights: dict[tuple[str, int], int], seed: int
) -> None:
    served = serve(fair, weights, seed, total=40 * LARGEST)
    tenants: dict[str, float] = {}
    for (tenant, _), work in served.items():
        tenants[tenant] = tenants.get(tenant, 0.0) + work
    assert max(tenants.values()) - min(tenants.values()) <= 2 * LARGEST
    for tenant in tenants:
        adapters = [work for (owner, _), work in served.items() if owner == tenant]
        assert max(adapters) - min(adapters) <= 2 * LARGEST


def test_first_come_first_served_would_not_keep_that_promise() -> None:
    weights = {("a", 1): 9, ("b", 1): 1}
    served = serve(first_come, weights, seed=0, total=40 * LARGEST)
    assert served["a", 1] - served["b", 1] > 10 * LARGEST
    served = serve(fair, weights, seed=0, total=40 * LARGEST)
    assert abs(served["a", 1] - served["b", 1]) <= 2 * LARGEST


@pytest.mark.parametrize("owed", [0.0, 100.0])
def test_what_is_promised_but_not_computed_yet_counts(owed: float) -> None:
    queue = FairQueue()
    for number, tenant in enumerate("ab"):
        queue.add(request(number, tenant, 1, 3, 1.0))
    order = [one.request.tenant for one in queue.in_order({("a", version(1)): owed}, ())]
    assert order == (["b", "a"] if owed else ["a", "b"])


def test_an_iteration_takes_turns_and_passes_over_what_is_skipped_meanwhile() -> None:
    queue = FairQueue()
    names = ["a1", "a1", "a2", "a1", "b1", "b1"]
    for number, (tenant, adapter) in enumerate(names):
        queue.add(request(number, tenant, int(adapter), 2, 1.0))
    assert [one.request.request_id for one in queue.in_order({}, ())] == [
        *("r0", "r4", "r2", "r5", "r1", "r3")
    ]
    skip: set[str | None] = set()
    order = []
    for one in queue.in_order({}, skip):
        order.append(one.request.request_id)
        if one.version == version(2):
            skip.add(version(1))
    assert order == ["r0", "r4", "r2"]
