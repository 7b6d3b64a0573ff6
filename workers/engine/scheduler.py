"""Which requests compute in the next step, and which tokens of them. Plain data and a clock passed in; no tensors.

A request waits for two things: its adapter's rows on the device, then a KV slot. It takes a reference to the adapter
as soon as the rows are there, so an adapter that was fetched for a request is not evicted before it ran. One that
waits for a cold adapter is passed by those behind it; apart from that, first come, first served.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from storage.errors import InvalidRequestError
from storage.identity import AdapterVersion
from workers.attention.slots import SlotLedger
from workers.engine.sequence import Sequence
from workers.row_form.step_plan import NotResidentError


class AdapterReferences(Protocol):
    """The part of the bank that admission needs."""

    def acquire(self, version: AdapterVersion) -> int:
        """Raises NotResidentError."""

    def release(self, version: AdapterVersion) -> None: ...


@dataclass(frozen=True, slots=True)
class ScheduledSpan:
    """The next tokens of one sequence. Logits are wanted where they complete what is known of it."""

    sequence: Sequence
    num_new: int

    @property
    def wants_logits(self) -> bool:
        return self.num_new == self.sequence.num_pending


class Scheduler:
    """See the module's docstring.

    Args:
        adapters: where references are taken and given back.
        ledger: KV slots, one for each admitted request.
        max_step_tokens: of one step; at least as many as there are KV slots, so that all running sequences advance.
    """

    def __init__(
        self, adapters: AdapterReferences, ledger: SlotLedger, *, max_step_tokens: int
    ) -> None:
        if max_step_tokens < ledger.num_slots:
            raise InvalidRequestError(
                f"max_step_tokens is {max_step_tokens}; it must be at least max_sequences, {ledger.num_slots}",
                param="engine.max_step_tokens",
            )
        self._adapters = adapters
        self._ledger = ledger
        self._max_step_tokens = max_step_tokens
        self._waiting: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def kv_slots_used(self) -> int:
        return self._ledger.num_used

    def sequences(self) -> list[Sequence]:
        """All of them, running ones first. From another thread than the engine's, a moment's picture."""
        return [*self._running.values(), *self._waiting.values()]

    def waiting(self) -> list[Sequence]:
        return list(self._waiting.values())

    def find(self, request_id: str) -> Sequence | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its request id must not be here yet."""
        if self.find(sequence.request.request_id) is not None:
            raise ValueError(f"request {sequence.request.request_id} is here already")
        self._waiting[sequence.request.request_id] = sequence

    def admit(
        self, now: float, closed: Collection[AdapterVersion] = ()
    ) -> tuple[AdapterVersion, ...]:
        """Give references and KV slots to as many waiting requests as can have them.

        Args:
            closed: adapters that take no new work now.

        Returns:
            The adapters that requests wait for and that are not resident, in order of need.
        """
        missing: dict[AdapterVersion, None] = {}
        # References are taken ahead for at most one more batch, so that a long queue does not hold the whole bank.
        ahead = self._ledger.num_slots
        for sequence in list(self._waiting.values()):
            if not self._ledger.num_free and ahead <= 0:
                break
            version = sequence.version
            if not sequence.is_held and version is not None:
                if version in closed:
                    continue
                if version in missing:
                    sequence.needed_load = True
                    continue
                try:
                    sequence.bank_slot = self._adapters.acquire(version)
                except NotResidentError:
                    sequence.needed_load = True
                    missing[version] = None
                    continue
            if self._ledger.num_free:
                self._start(sequence, now)
            else:
                ahead -= 1
        return tuple(missing)

    def next_step(self) -> list[ScheduledSpan]:
        """Running sequences' next tokens within the budget: first one for each that decodes, by KV slot, so that
        they form one batch; then prompts, as far as they fit, oldest first.
        """
        decode = [one for one in self._running.values() if one.num_pending == 1]
        decode.sort(key=lambda one: one.kv_slot or 0)
        spans = [ScheduledSpan(one, 1) for one in decode]
        budget = self._max_step_tokens - len(spans)
        for one in self._running.values():
            if one.num_pending > 1 and budget > 0:
                num_new = min(one.num_pending, budget)
                spans.append(ScheduledSpan(one, num_new))
                budget -= num_new
        return spans

    def advance(self, span: ScheduledSpan) -> None:
        """The span's tokens are in the KV cache."""
        sequence = span.sequence
        if sequence.kv_slot is None:
            raise ValueError(f"request {sequence.request.request_id} is not running")
        self._ledger.grow(sequence.kv_slot, span.num_new)
        sequence.num_computed += span.num_new

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence and give back all it holds. True if that freed a reference to an adapter."""
        self._waiting.pop(sequence.request.request_id, None)
        self._running.pop(sequence.request.request_id, None)
        if sequence.kv_slot is not None:
            self._ledger.free(sequence.kv_slot)
            sequence.kv_slot = None
        if sequence.version is None or sequence.bank_slot is None:
            return False
        self._adapters.release(sequence.version)
        sequence.bank_slot = None
        return True

    def work_left(self) -> dict[AdapterVersion, float]:
        """Rank-weighted tokens left of the requests that hold an adapter, by adapter."""
        work: dict[AdapterVersion, float] = {}
        for one in self.sequences():
            if one.version is not None and one.bank_slot is not None:
                work[one.version] = work.get(one.version, 0.0) + one.work_left
        return work

    def check_integrity(self) -> bool:
        """Running sequences, and no others, hold a KV slot of their own with exactly their tokens; running ones hold
        their adapter.
        """
        slots = [one.kv_slot for one in self._running.values()]
        return (
            self._ledger.check_integrity()
            and len(set(slots)) == len(slots) == self._ledger.num_used
            and all(
                one.is_held
                and one.kv_slot is not None
                and self._ledger.tokens(one.kv_slot) == one.num_computed < one.num_tokens
                for one in self._running.values()
            )
            and all(one.kv_slot is None and not one.num_computed for one in self._waiting.values())
            and not self._waiting.keys() & self._running.keys()
        )

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.kv_slot = self._ledger.allocate()
        sequence.admitted_s = now
        del self._waiting[sequence.request.request_id]
        self._running[sequence.request.request_id] = sequence
