"""Which requests compute in the next step, and which tokens of them. Plain data and a clock passed in; no tensors.

A request waits for two things: its adapter's rows on the device, then a KV slot with blocks for its tokens. It takes a
reference to the adapter as soon as the rows are there, so an adapter that was fetched for a request is not evicted
before it ran. Who goes first is `FairQueue`'s to say; one that waits for a cold adapter is passed by those behind it.

Whoever is admitted draws a ticket. When KV blocks run out, the running sequence with the latest ticket gives its own
back, waits, and computes its tokens again later, before anybody new is admitted. So the one with the earliest ticket
always advances, and whatever is admitted is finished.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from storage.errors import InvalidRequestError
from storage.identity import AdapterVersion
from workers.engine.fair_queue import Account, FairQueue, account_of
from workers.engine.kv_allocator import KvAllocator
from workers.engine.sequence import Sequence
from workers.engine.step_budget import ScheduledSpan, StepBudget
from workers.row_form.step_plan import NotResidentError


class AdapterReferences(Protocol):
    """The part of the bank that admission needs."""

    def find(self, version: AdapterVersion) -> int | None:
        """Its slot, if its rows are ready."""

    def acquire(self, version: AdapterVersion) -> int:
        """Raises NotResidentError."""

    def release(self, version: AdapterVersion) -> None: ...


class Scheduler:
    """See the module's docstring.

    Args:
        adapters: where references are taken and given back.
        kv: slots, one for each running sequence, and blocks, enough for the longest sequence there can be.
        budget: of one step; at least as many tokens as there are KV slots, so that all running sequences advance.
    """

    def __init__(self, adapters: AdapterReferences, kv: KvAllocator, budget: StepBudget) -> None:
        if budget.max_tokens < kv.num_slots:
            raise InvalidRequestError(
                f"max_step_tokens is {budget.max_tokens}; it must be at least max_sequences, {kv.num_slots}",
                param="engine.max_step_tokens",
            )
        self._adapters = adapters
        self._kv = kv
        self._budget = budget
        self._queue = FairQueue()
        self._waiting: dict[str, Sequence] = {}  # never ran: those in the queue
        self._preempted: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._num_ahead = 0  # of those that wait hold a reference
        self._num_tickets = 0
        self._missing_at_s: dict[AdapterVersion, float] = {}
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def sequences(self) -> list[Sequence]:
        """All of them, running ones first. From another thread than the engine's, a moment's picture."""
        return [*self._running.values(), *self.waiting()]

    def waiting(self) -> list[Sequence]:
        return [*self._preempted.values(), *self._waiting.values()]

    def find(self, request_id: str) -> Sequence | None:
        for place in (self._running, self._preempted, self._waiting):
            if request_id in place:
                return place[request_id]
        return None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its request id must not be here yet."""
        if self.find(sequence.request.request_id) is not None:
            raise ValueError(f"request {sequence.request.request_id} is here already")
        self._waiting[sequence.request.request_id] = sequence
        self._queue.add(sequence)

    def admit(
        self, now: float, closed: Collection[AdapterVersion] = ()
    ) -> tuple[AdapterVersion, ...]:
        """Give references and room in the KV cache to as many waiting requests as can have them.

        Args:
            closed: adapters that take no new work now.

        Returns:
            The adapters that requests wait for and that are not resident, in order of need.
        """
        has_room = self._readmit()
        # References are taken ahead for at most one more batch, so that a long queue does not hold the whole bank.
        ahead = self._kv.num_slots
        missing: dict[AdapterVersion, None] = {}
        passed: set[AdapterVersion | None] = set()
        started = []
        for sequence in self._queue.in_order(self._owed(), passed):
            if not has_room and ahead <= 0:
                break
            version = sequence.version
            if version is not None and not sequence.is_held:
                if version in closed:
                    passed.add(version)
                    continue
                may_hold = has_room or self._num_ahead < self._kv.num_slots
                if not self._try_acquire(sequence, version, may_hold):
                    missing[version] = None
                    passed.add(version)
                    continue
            # Whoever is first and finds no room keeps those behind from taking it bit by bit.
            if has_room and self._kv.try_begin(sequence, self._running.values()):
                self._start(sequence, now)
                started.append(sequence)
            else:
                has_room = False
                ahead -= 1
        for sequence in started:
            self._leave_queue(sequence)
        self._note_missing(missing, now)
        return tuple(missing)

    def next_step(self) -> list[ScheduledSpan]:
        """Running sequences' next tokens within the budget, prompts of the least served first.

        Sequences for whose next token no block is left are preempted, or preempt others.
        """
        self._make_room_to_decode()
        return self._budget.fill(
            self._running.values(),
            turn=lambda one: (self._queue.standing(account_of(one)), _ticket(one)),
        )

    def advance(self, span: ScheduledSpan) -> None:
        """The span's tokens are in the KV cache."""
        sequence = span.sequence
        self._kv.computed(sequence, span.num_new)
        # What a preempted sequence computes again is no service to it.
        num_served = sequence.num_computed - sequence.num_served
        if num_served > 0:
            sequence.num_served = sequence.num_computed
            self._queue.charge(account_of(sequence), num_served * sequence.request.work_per_token)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence and give back all it holds. True if that freed a reference to an adapter.

        Raises KeyError if it is not here.
        """
        request_id = sequence.request.request_id
        if request_id in self._waiting:
            self._num_ahead -= sequence.bank_slot is not None
            self._leave_queue(sequence)
        self._preempted.pop(request_id, None)
        if self._running.pop(request_id, None) is not None:
            self._kv.release(sequence)
        self._queue.leave(sequence)
        if sequence.version is None or sequence.bank_slot is None:
            return False
        self._adapters.release(sequence.version)
        sequence.bank_slot = None
        return True

    def start_over(self) -> None:
        """Trust nothing that is in the KV cache: what runs is computed again from its first token."""
        for sequence in list(self._running.values()):
            self._preempt(sequence)
        self._kv.forget()

    def work_left(self) -> dict[AdapterVersion, float]:
        """Rank-weighted tokens left of the requests that hold an adapter, by adapter."""
        work: dict[AdapterVersion, float] = {}
        for one in self.sequences():
            if one.version is not None and one.bank_slot is not None:
                work[one.version] = work.get(one.version, 0.0) + one.work_left
        return work

    def check_integrity(self) -> bool:
        """Running sequences, and no others, hold KV slot and blocks; those that ran hold their adapter."""
        ran = [*self._running.values(), *self._preempted.values()]
        names = [one.request.request_id for one in self.sequences()]
        return (
            self._kv.check_integrity(self._running.values())
            and self._queue.check_integrity()
            and len(set(names)) == len(names)
            and all(one.is_held and one.ticket is not None for one in ran)
            and all(one.ticket is None for one in self._waiting.values())
            and self._num_ahead == sum(one.bank_slot is not None for one in self._waiting.values())
            and all(
                one.kv_slot is None and not one.blocks and not one.num_computed
                for one in self.waiting()
            )
        )

    def _readmit(self) -> bool:
        """Let preempted sequences run again, the earliest first; whether there may be room for others after them."""
        for sequence in sorted(self._preempted.values(), key=_ticket):
            if not self._kv.try_begin(sequence, self._running.values()):
                return False
            del self._preempted[sequence.request.request_id]
            self._running[sequence.request.request_id] = sequence
        return self._kv.slots_used < self._kv.num_slots

    def _try_acquire(self, sequence: Sequence, version: AdapterVersion, may_hold: bool) -> bool:
        """Whether the adapter's rows are there; the sequence has its reference then, where it may hold one."""
        if not may_hold:
            return self._adapters.find(version) is not None
        try:
            sequence.bank_slot = self._adapters.acquire(version)
        except NotResidentError:
            return False
        self._num_ahead += 1
        missing_at_s = self._missing_at_s.get(version)
        sequence.needed_load = missing_at_s is not None and sequence.arrived_s <= missing_at_s
        return True

    def _note_missing(self, missing: Collection[AdapterVersion], now: float) -> None:
        """Remember when adapters were looked for in vain, as long as somebody waits for them."""
        if self._missing_at_s:
            wanted = self._queue.adapters()
            self._missing_at_s = {
                version: at_s for version, at_s in self._missing_at_s.items() if version in wanted
            }
        self._missing_at_s.update(dict.fromkeys(missing, now))

    def _start(self, sequence: Sequence, now: float) -> None:
        self._num_ahead -= sequence.bank_slot is not None
        sequence.num_served = sequence.num_reused = sequence.num_computed
        sequence.admitted_s = now
        sequence.ticket = self._num_tickets
        self._num_tickets += 1
        self._running[sequence.request.request_id] = sequence

    def _leave_queue(self, sequence: Sequence) -> None:
        del self._waiting[sequence.request.request_id]
        self._queue.start(sequence)

    def _owed(self) -> dict[Account, float]:
        """Work that running sequences were promised and is not done yet."""
        owed: dict[Account, float] = {}
        if self._waiting:
            for one in self._running.values():
                left = one.num_tokens - one.num_served
                account = account_of(one)
                owed[account] = owed.get(account, 0.0) + left * one.request.work_per_token
        return owed

    def _make_room_to_decode(self) -> None:
        for sequence in sorted(self._running.values(), key=_ticket):
            while sequence.kv_slot is not None and not self._kv.try_grow(sequence):
                self._preempt(max(self._running.values(), key=_ticket))

    def _preempt(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        del self._running[sequence.request.request_id]
        self._preempted[sequence.request.request_id] = sequence
        self.num_preemptions += 1


def _ticket(sequence: Sequence) -> int:
    if sequence.ticket is None:
        raise ValueError(f"request {sequence.request.request_id} was never admitted")
    return sequence.ticket
