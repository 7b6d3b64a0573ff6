"""The scheduler under random use, and who goes first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import InvalidRequestError
from storage.identity import AdapterSet, AdapterVersion
from tests.workers.engine.small_engine import version
from workers.attention.blocks import BlockLedger
from workers.attention.slots import SlotLedger
from workers.bank.bank import AdapterBank, BankBusyError
from workers.engine.kv_allocator import KvAllocator
from workers.engine.request import EngineRequest, SamplingParams
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence

NUM_SLOTS, MAX_TOKENS, BUDGET, BANK_ROWS, BLOCK_TOKENS = 3, 24, 6, 4, 4


def small_bank() -> AdapterBank:
    return AdapterBank(
        {"q": (2, 2)},
        num_rows=BANK_ROWS,
        num_slots=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def rows(rank: int) -> AdapterRows:
    return AdapterRows(
        {"q": ModuleRows(mul_a_RO=torch.ones(rank, 2), mul_b_RI=torch.ones(rank, 2))}
    )


def sequence(
    name: str, prompt: int = 3, answer: int = 4, adapter: AdapterVersion | None = None
) -> Sequence:
    request = EngineRequest(
        name, tuple(range(prompt)), SamplingParams(max_tokens=answer), AdapterSet.of(adapter)
    )
    return Sequence(request, arrived_s=0.0)


def scheduler(
    bank: AdapterBank | None = None,
    num_slots: int = NUM_SLOTS,
    num_blocks: int = 99,
    *,
    prefix_cache: bool = False,
    max_step_work: int = 999,
) -> Scheduler:
    kv = KvAllocator(
        SlotLedger(num_slots, MAX_TOKENS),
        BlockLedger(num_blocks, BLOCK_TOKENS),
        prefix_cache=prefix_cache,
    )
    return Scheduler(bank or small_bank(), kv, max_step_tokens=BUDGET, max_step_work=max_step_work)


def step(one: Scheduler) -> list[tuple[str, int]]:
    """Compute a step as the engine would, with token 7 for an answer; returns names and token counts."""
    spans = one.next_step()
    done = [(span.sequence.request.request_id, span.num_new) for span in spans]
    for span in spans:
        wants = span.wants_logits
        one.advance(span)
        if wants:
            span.sequence.answer.append(7)
            if len(span.sequence.answer) == span.sequence.request.sampling.max_tokens:
                one.remove(span.sequence)
    return done


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go and compute, adapters come and are evicted, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = small_bank()
        self.scheduler = scheduler(self.bank)
        self.number = 0
        self.closed: frozenset[AdapterVersion] = frozenset()

    @rule(
        prompt=st.integers(1, 12),
        answer=st.integers(1, 12),
        adapter=st.one_of(st.none(), st.integers(1, 4)),
    )
    def submit(self, prompt: int, answer: int, adapter: int | None) -> None:
        self.number += 1
        user = None if adapter is None else version(adapter)
        self.scheduler.add(sequence(f"r{self.number}", prompt, answer, user))

    @rule(adapter=st.integers(1, 4))
    def load(self, adapter: int) -> None:
        try:
            self.bank.load(version(adapter), rows(adapter))
        except BankBusyError:
            assert self.bank.references()

    @rule(closed=st.sets(st.integers(1, 4), max_size=2))
    def close(self, closed: set[int]) -> None:
        self.closed = frozenset(version(one) for one in closed)

    @rule()
    def admit(self) -> None:
        before = {one.request.request_id: one.is_held for one in self.scheduler.sequences()}
        missing = self.scheduler.admit(1.0, self.closed)
        assert not {one for one in missing if self.bank.find(one) is not None}
        for one in self.scheduler.sequences():
            if one.version in self.closed and one.bank_slot is not None:
                assert before[one.request.request_id]

    @rule()
    def compute(self) -> None:
        running = {
            one.request.request_id: one.num_pending
            for one in self.scheduler.sequences()
            if one.kv_slot is not None
        }
        done = dict(step(self.scheduler))
        assert sum(done.values()) <= BUDGET
        assert done.keys() <= running.keys()
        assert all(0 < count <= running[name] for name, count in done.items())
        # Whoever decodes gets its token, and the budget is not left unused.
        assert all(done.get(name) == 1 for name, pending in running.items() if pending == 1)
        assert sum(done.values()) == min(BUDGET, sum(running.values()))

    @precondition(lambda self: self.scheduler.sequences())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.scheduler.sequences()))
        self.scheduler.remove(one)
        assert one.kv_slot is None
        assert one.bank_slot is None

    @invariant()
    def books_agree(self) -> None:
        assert self.scheduler.check_integrity()
        assert self.bank.check_integrity()
        held: dict[AdapterVersion, int] = {}
        for one in self.scheduler.sequences():
            if one.bank_slot is not None:
                assert one.version is not None
                held[one.version] = held.get(one.version, 0) + 1
        assert self.bank.references() == held

    def teardown(self) -> None:
        """Whatever happened, everything that is here is answered once its adapter can come."""
        self.closed = frozenset()
        for _ in range(2000):
            if not self.scheduler.sequences():
                break
            for missing in self.scheduler.admit(2.0):
                self.load(int(missing, 16))
            step(self.scheduler)
        assert not self.scheduler.sequences()
        assert not self.bank.references()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_requests_are_admitted_in_the_order_they_came() -> None:
    one = scheduler()
    for number in range(5):
        one.add(sequence(f"r{number}", answer=2))
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["r0", "r1"]
    while one.num_running == NUM_SLOTS:
        step(one)
    one.admit(0.0)
    assert {span.sequence.request.request_id for span in one.next_step()} >= {"r3"}


def test_a_request_for_a_cold_adapter_is_passed_and_keeps_its_place() -> None:
    bank = small_bank()
    one = scheduler(bank, num_slots=1)
    for number, user in enumerate([version(1), None, None]):
        one.add(sequence(f"r{number}", adapter=user, answer=1))
    assert one.admit(0.0) == (version(1),)
    assert [name for name, _ in step(one)] == ["r1"]
    bank.load(version(1), rows(1))
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["r0"]


def test_an_adapter_that_came_for_a_waiting_request_is_not_evicted_before_it_ran() -> None:
    bank = small_bank()
    one = scheduler(bank, num_slots=1)
    one.add(sequence("running", answer=9))
    one.add(sequence("waiting", adapter=version(4)))
    one.admit(0.0)
    bank.load(version(4), rows(4))
    one.admit(0.0)
    with pytest.raises(BankBusyError):
        bank.load(version(3), rows(3))


def test_references_are_taken_ahead_for_one_more_batch_only() -> None:
    bank = small_bank()
    bank.load(version(1), rows(1))
    one = scheduler(bank, num_slots=2)
    for number in range(9):
        one.add(sequence(f"r{number}", adapter=version(1)))
    one.admit(0.0)
    assert bank.references() == {version(1): 4}


def test_decoding_requests_come_first_and_by_slot_and_prompts_fill_the_rest() -> None:
    one = scheduler()
    one.add(sequence("long", prompt=10))
    one.admit(0.0)
    assert step(one) == [("long", BUDGET)]
    one.add(sequence("short", prompt=1))
    one.add(sequence("late", prompt=9))
    one.admit(0.0)
    assert step(one) == [("short", 1), ("long", 4), ("late", 1)]
    assert step(one) == [("long", 1), ("short", 1), ("late", 4)]


def test_decoding_requests_are_batched_by_slot_whoever_came_first() -> None:
    one = scheduler()
    for name, answer in (("brief", 1), ("long", 9), ("longer", 9)):
        one.add(sequence(name, prompt=1, answer=answer))
    one.admit(0.0)
    step(one)
    one.add(sequence("heir", prompt=1))
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["heir", "long", "longer"]


def test_a_budget_below_the_number_of_sequences_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"max_step_tokens is 6.*max_sequences, 7"):
        scheduler(num_slots=7)


def test_the_same_request_id_is_not_taken_twice() -> None:
    one = scheduler()
    one.add(sequence("r"))
    with pytest.raises(ValueError, match="r is here already"):
        one.add(sequence("r"))
