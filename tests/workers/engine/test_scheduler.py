"""The scheduler under random use, and who goes first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import InvalidRequestError
from storage.identity import AdapterSet, AdapterVersion
from tests.workers.engine.small_engine import version
from workers.attention.blocks import BlockLedger
from workers.attention.slots import SlotLedger
from workers.bank.bank import AdapterBank
from workers.bank.books import BankBusyError
from workers.engine.kv_allocator import KvAllocator
from workers.engine.request import EngineRequest, SamplingParams
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence
from workers.engine.step_budget import ScheduledSpan, StepBudget

NUM_SLOTS, MAX_TOKENS, BUDGET, BANK_ROWS, BLOCK_TOKENS = 3, 24, 6, 4, 4
LONGEST = 24  # prompt and answer
MAX_STEP_WORK = 12


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
    name: str,
    prompt: int = 3,
    answer: int = 4,
    adapter: AdapterVersion | None = None,
    tenant: str = "a",
    work_per_token: float = 1.0,
) -> Sequence:
    request = EngineRequest(
        name,
        tuple(range(prompt)),
        SamplingParams(max_tokens=answer),
        AdapterSet.of(adapter),
        tenant=tenant,
        work_per_token=work_per_token,
    )
    return Sequence(request, arrived_s=0.0)


def scheduler(
    bank: AdapterBank | None = None,
    num_slots: int = NUM_SLOTS,
    num_blocks: int = 99,
    *,
    prefix_cache: bool = False,
    max_step_tokens: int = BUDGET,
    max_step_work: int = 999,
) -> Scheduler:
    kv = KvAllocator(
        SlotLedger(num_slots, MAX_TOKENS),
        BlockLedger(num_blocks, BLOCK_TOKENS),
        prefix_cache=prefix_cache,
    )
    budget = StepBudget(max_step_tokens, max_step_work, least_tokens=BLOCK_TOKENS)
    return Scheduler(bank or small_bank(), kv, budget)


def step(one: Scheduler) -> list[tuple[str, int]]:
    """Compute a step as the engine would, with token 7 for an answer; returns names and token counts."""
    spans = one.next_step()
    compute(one, spans)
    return [(span.sequence.request.request_id, span.num_new) for span in spans]


def compute(one: Scheduler, spans: list[ScheduledSpan]) -> None:
    for span in spans:
        wants = span.wants_logits
        one.advance(span)
        if wants:
            span.sequence.answer.append(7)
            if len(span.sequence.answer) == span.sequence.request.sampling.max_tokens:
                one.remove(span.sequence)


def _work(spans: list[ScheduledSpan]) -> float:
    return sum(span.num_new * span.sequence.request.work_per_token for span in spans)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go and compute, adapters come and are evicted, KV blocks run out, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = small_bank()
        self.number = 0
        self.closed: frozenset[AdapterVersion] = frozenset()

    @initialize(num_blocks=st.integers(LONGEST // BLOCK_TOKENS, 20), prefix_cache=st.booleans())
    def begin(self, num_blocks: int, prefix_cache: bool) -> None:
        self.scheduler = scheduler(
            self.bank, num_blocks=num_blocks, prefix_cache=prefix_cache, max_step_work=MAX_STEP_WORK
        )

    @rule(
        prompt=st.integers(1, LONGEST // 2),
        answer=st.integers(1, LONGEST // 2),
        adapter=st.one_of(st.none(), st.integers(1, 4)),
        tenant=st.sampled_from("ab"),
    )
    def submit(self, prompt: int, answer: int, adapter: int | None, tenant: str) -> None:
        self.number += 1
        user = None if adapter is None else version(adapter)
        work = 1.0 if adapter is None else 1.0 + adapter
        self.scheduler.add(sequence(f"r{self.number}", prompt, answer, user, tenant, work))

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
        running = [one for one in self.scheduler.sequences() if one.kv_slot is not None]
        running.sort(key=lambda one: one.ticket or 0)
        spans = self.scheduler.next_step()
        # Whoever was admitted last gives way, and the first never does.
        kept = [one for one in running if one.kv_slot is not None]
        assert kept == running[: max(1, len(kept))]
        count = {span.sequence.request.request_id: span.num_new for span in spans}
        assert all(0 < count.get(one.request.request_id, 1) <= one.num_pending for one in kept)
        assert len(count) <= len(kept)
        assert sum(count.values()) <= BUDGET
        # Whoever decodes gets its token, and of the prompts one advances at least.
        assert all(count[one.request.request_id] == 1 for one in kept if one.num_pending == 1)
        prompts = [span for span in spans if span.sequence.num_pending > 1]
        assert bool(prompts) == any(one.num_pending > 1 for one in kept)
        assert _work(spans) <= MAX_STEP_WORK or _work(prompts[1:]) == 0
        assert not prompts or prompts[0].num_new <= max(BLOCK_TOKENS, MAX_STEP_WORK)
        compute(self.scheduler, spans)

    @precondition(lambda self: self.scheduler.sequences())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.scheduler.sequences()))
        self.scheduler.remove(one)
        assert one.kv_slot is None
        assert one.bank_slot is None

    @rule()
    def fail(self) -> None:
        """A step went wrong: what is in the cache is worth nothing, to anybody."""
        self.scheduler.start_over()
        assert self.scheduler.num_running == 0
        self.scheduler.admit(1.0, self.closed)
        assert not any(one.num_computed for one in self.scheduler.sequences())

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


def test_room_in_the_cache_is_for_whoever_is_first_and_not_for_smaller_ones_behind() -> None:
    one = scheduler(num_blocks=6)
    one.add(sequence("running", prompt=8, answer=1))
    one.add(sequence("large", prompt=20, answer=1))
    one.add(sequence("small", prompt=4, answer=1))
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["running"]
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["running"]
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["large"]


def test_the_latest_gives_its_blocks_back_keeps_its_answer_and_runs_before_newcomers() -> None:
    one = scheduler(num_blocks=4)
    for name in ("early", "late"):
        one.add(sequence(name, prompt=3, answer=9))
    one.admit(0.0)
    late = one.find("late")
    assert late is not None
    while late.kv_slot is not None:
        step(one)
    answer = list(late.answer)
    assert len(answer) == 6  # 9 tokens of 8 would need a third block
    assert (late.blocks, late.num_computed, one.num_preemptions) == ([], 0, 1)
    one.add(sequence("newcomer", prompt=1, answer=1))
    while one.find("early") is not None:
        one.admit(0.0)
        assert [name for name, _ in step(one)] == ["early"]
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["newcomer", "late"]
    assert late.answer[:6] == answer


def test_tokens_computed_again_are_no_service() -> None:
    """Or a tenant would pay for the memory that others took."""
    one = scheduler(num_slots=2, num_blocks=4)
    one.add(sequence("early", prompt=3, answer=9, tenant="a"))
    one.add(sequence("late", prompt=3, answer=8, tenant="b"))
    while one.sequences():
        one.admit(0.0)
        step(one)
    assert one.num_preemptions == 1
    for tenant in "ab":
        one.add(sequence(f"next of {tenant}", answer=1, tenant=tenant, prompt=BUDGET))
    one.admit(0.0)
    assert [name for name, _ in step(one)] == ["next of b"]


def test_prompts_are_cut_by_their_work() -> None:
    one = scheduler(max_step_tokens=50, max_step_work=65)
    one.add(sequence("light", prompt=1, answer=9))
    one.admit(0.0)
    step(one)
    one.add(sequence("base", prompt=20))
    one.add(sequence("heavy", prompt=20, work_per_token=8.0))
    one.admit(0.0)
    assert step(one) == [("light", 1), ("base", 20), ("heavy", 5)]
    assert step(one) == [("light", 1), ("base", 1), ("heavy", 7)]


def test_prompts_of_two_tenants_take_turns_by_what_they_were_served() -> None:
    one = scheduler()
    for tenant in "ab":
        one.add(sequence(f"of {tenant}", prompt=20, answer=1, tenant=tenant))
    one.admit(0.0)
    turns = [step(one) for _ in range(7)]
    assert turns[:4] == [[("of a", 6)], [("of b", 6)]] * 2
    assert turns[4:] == [[("of a", 6)], [("of b", 6)], [("of a", 2), ("of b", 2)]]


def test_a_prompt_advances_by_a_block_where_decoding_takes_all_the_work() -> None:
    one = scheduler(max_step_work=1)
    one.add(sequence("light", prompt=1, answer=9))
    one.admit(0.0)
    step(one)
    one.add(sequence("heavy", prompt=20, work_per_token=8.0))
    one.admit(0.0)
    assert step(one) == [("light", 1), ("heavy", BLOCK_TOKENS)]


def test_a_budget_below_the_number_of_sequences_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"max_step_tokens is 6.*max_sequences, 7"):
        scheduler(num_slots=7)


def test_the_same_request_id_is_not_taken_twice() -> None:
    one = scheduler()
    one.add(sequence("r"))
    with pytest.raises(ValueError, match="r is here already"):
        one.add(sequence("r"))
