"""The engine: requests join and leave between steps, and every step computes tokens of all that run.

One thread at a time; only `validate` and `load` may be called from others. It never waits: not for an adapter, not for
a client. A failed adapter ends its requests with an error, and is never replaced by the base model.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ordered

from storage.errors import FloraError
from storage.identity import AdapterVersion
from workers.attention.blocks import BlockLedger
from workers.attention.slots import SlotLedger
from workers.bank.bank import AdapterBank
from workers.bank.loader import AdapterLoader
from workers.config import EngineSettings
from workers.engine.client import EngineLoad
from workers.engine.kv_allocator import KvAllocator
from workers.engine.outbox import Outbox, not_finite
from workers.engine.prompt_scores import score_prompts
from workers.engine.recent_times import RecentTimes
from workers.engine.request import EngineRequest, FinishReason, StepOutputs
from workers.engine.sampling.greedy import choose_greatest
from workers.engine.sampling.row import SampledToken
from workers.engine.sampling.sampler import sample
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence
from workers.engine.starvation import StarvationRule
from workers.engine.step_budget import ScheduledSpan, StepBudget
from workers.engine.step_figures import StepFigures
from workers.engine.step_input import build_step_input, sampling_row
from workers.engine.validation import RequestLimits, validate_request
from workers.models.runner import ModelRunner
from workers.threads import engine_threads

_log = logging.getLogger(__name__)


class Engine:
    """See the module's docstring.

    Args:
        runner: the model, bound to `bank`.
        clock: what waiting is measured on, in seconds.
        wall_clock: what requests' deadlines are on, in seconds.
    """

    def __init__(
        self,
        runner: ModelRunner,
        bank: AdapterBank,
        loader: AdapterLoader,
        settings: EngineSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.bank = bank
        self.loader = loader
        self.num_threads = engine_threads(settings.threads)
        self._clock = clock
        self._wall_clock = wall_clock
        self._eos_token_ids = runner.shape.eos_token_ids
        self._greatest = choose_greatest(runner.device, compiled=settings.compiled)
        blocks = BlockLedger(settings.kv_blocks, settings.kv_block_tokens)
        self.limits = RequestLimits(
            vocab_size=runner.shape.vocab_size,
            max_tokens=min(
                settings.max_sequence_tokens,
                runner.shape.max_positions,
                blocks.num_blocks * blocks.block_tokens,
            ),
            eos_token_ids=runner.shape.eos_token_ids,
        )
        self._kv = KvAllocator(
            SlotLedger(settings.max_sequences, self.limits.max_tokens),
            blocks,
            prefix_cache=settings.prefix_cache,
        )
        budget = StepBudget(
            settings.max_step_tokens, settings.max_step_work, least_tokens=blocks.block_tokens
        )
        self._scheduler = Scheduler(bank, self._kv, budget)
        self._starvation = StarvationRule()
        self._wanted_pins: frozenset[AdapterVersion] = frozenset()
        self._applied_pins: frozenset[AdapterVersion] = frozenset()
        self._outbox = Outbox(clock, loader.tier)
        self._figures = StepFigures()
        self._first_tokens = RecentTimes()
        self._misses = 0
        self._tokens_out = 0
        self._step_errors = 0
        self._failed_in_a_row = 0

    @property
    def has_requests(self) -> bool:
        return bool(self._scheduler.num_waiting or self._scheduler.num_running or self._outbox)

    @property
    def failed_steps_in_a_row(self) -> int:
        return self._failed_in_a_row

    # Requests come and go.

    def validate(self, request: EngineRequest) -> None:
        """Raises as `validate_request`; callable from any thread."""
        validate_request(request, self.limits)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises as `validate`, and ValueError if its id is in the engine already."""
        self.validate(request)
        now = self._clock()
        deadline_s = None
        if request.deadline_s is not None:
            deadline_s = now + request.deadline_s - self._wall_clock()
        sequence = Sequence(request, arrived_s=now, deadline_s=deadline_s)
        self._scheduler.add(sequence)
        if sequence.version is not None and self.bank.find(sequence.version) is None:
            self._misses += 1

    def abort(self, request_id: str) -> None:
        """Free all a request holds, now; its last output comes with the next step. No error when it is gone."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._end(sequence, FinishReason.ABORT)

    def end_all(self, error: Exception) -> StepOutputs:
        """End every request with this error now, and return the last outputs."""
        for sequence in self._scheduler.sequences():
            self._end(sequence, FinishReason.ERROR, error)
        return StepOutputs(self._outbox.take())

    def prefetch(
        self,
        wanted: Ordered[AdapterVersion],
        pinned: frozenset[AdapterVersion],
        near: Ordered[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None:
        """As `EngineClient.prefetch`."""
        self._wanted_pins = pinned
        self._apply_pins()
        self.loader.prefetch(wanted, near, retired)

    def load(self) -> EngineLoad:
        """What the engine has to do and holds. `host` and `disk` are the adapter cache's to fill in."""
        scheduler, bank = self._scheduler, self.bank
        counters, loads = bank.counters, self.loader.report()
        return EngineLoad(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            work=sum(one.work_left for one in scheduler.sequences()),
            kv_slots_used=self._kv.slots_used,
            kv_slots=self._kv.num_slots,
            kv_blocks_used=self._kv.blocks_held,
            kv_blocks=self._kv.num_blocks,
            prefix_tokens_reused=self._kv.tokens_reused,
            preemptions=scheduler.num_preemptions,
            bank_rows_used=bank.rows_used,
            bank_rows=bank.num_rows,
            bank_slots=bank.num_slots,
            device=bank.residents(),
            loads=counters.loads,
            evictions=counters.evictions,
            tokens_out=self._tokens_out,
            step_errors=self._step_errors,
            threads=self.num_threads,
            load_wait_s=counters.wait_s,
            queued_work=sum(one.work_left for one in scheduler.waiting()),
            first_token_p99_s=self._first_tokens.quantile(0.99, self._clock()),
            misses=self._misses,
            load_s=loads.load_s,
            load_errors=loads.num_errors,
            failed=loads.failed,
            figures=self._figures.read().merged(loads.figures),
        )

    # One step.

    def step(self) -> StepOutputs:
        """Admit what can be admitted, compute one step, return what it brought; at once with nothing to compute."""
        start_s = self._clock()
        self.bank.waits.step_here()
        self._expire(start_s)
        self._admit(start_s)
        spans = self._scheduler.next_step()
        if spans:
            self._compute(spans, start_s)
        return StepOutputs(
            outputs=self._outbox.take(),
            num_tokens=sum(span.num_new for span in spans),
        )

    def check_integrity(self) -> bool:
        """The books of scheduler, KV cache, loader and bank agree. Only between steps."""
        held = Counter(
            one.version for one in self._scheduler.sequences() if one.bank_slot is not None
        )
        return (
            self._scheduler.check_integrity()
            and self.bank.check_integrity()
            and self.loader.references_of_others() == held
        )

    def _expire(self, now: float) -> None:
        for sequence in self._scheduler.sequences():
            if sequence.deadline_s is not None and now >= sequence.deadline_s:
                self._end(sequence, FinishReason.ABORT)

    def _admit(self, now: float) -> None:
        claims, failures = self.loader.claims, self.loader.take_failures()
        missing = self._scheduler.admit(now, self._starvation.closed)
        self.loader.release_claims(claims)
        for version in missing:
            error = failures.get(version) or self.loader.request(version)
            if error is not None:
                failures[version] = error
        self._tell(failures)
        self._relieve(now, missing)

    def _tell(self, failures: Mapping[AdapterVersion, Exception]) -> None:
        """End every request that waits for an adapter whose load failed."""
        for sequence in self._scheduler.waiting() if failures else ():
            version = sequence.version
            if version is not None and version in failures and not sequence.is_held:
                self._end(sequence, FinishReason.ERROR, failures[version])

    def _relieve(self, now: float, missing: Ordered[AdapterVersion]) -> None:
        """Close adapters to new work while a request waits too long for room."""
        without_room = [version for version in missing if self.loader.waits_for_room(version)]
        late = {
            sequence.version
            for sequence in (self._scheduler.waiting() if without_room else ())
            if now - sequence.arrived_s > self.settings.starvation_s
        }
        starving = [version for version in without_room if version in late]
        work_left = {}
        if starving:
            work_left = dict.fromkeys(self.bank.residents(), 0.0) | self._scheduler.work_left()
        self._starvation.update(
            starving=starving,
            is_trying=any(self.loader.is_trying(version) for version in starving),
            work_left=work_left,
            pinned=self._wanted_pins,
        )
        self._apply_pins()

    def _apply_pins(self) -> None:
        pins = self._wanted_pins - self._starvation.closed
        if pins != self._applied_pins:
            self.bank.pin(pins)
            self._applied_pins = pins
            self.loader.rows_freed()

    def _compute(self, spans: Ordered[ScheduledSpan], start_s: float) -> None:
        answering = [span.sequence for span in spans if span.wants_logits]
        try:
            step = build_step_input(
                spans, self.bank.resident_slots, self.runner.device, *self._kv.take_copies()
            )
            rows = [sampling_row(one, self._eos_token_ids) for one in answering]
            logits_LV = self.runner.forward(step)
            prompt_logprobs = score_prompts(spans, logits_LV[len(answering) :])
            tokens = sample(logits_LV[: len(answering)], rows, self._greatest)
        except Exception:
            # What the step half wrote is lost with the requests that were in it; those that wait go on.
            _log.exception("an engine step of %d requests failed", len(spans))
            self._step_errors += 1
            self._failed_in_a_row += 1
            error = FloraError("the model failed while answering; the request may be sent again")
            for span in spans:
                self._end(span.sequence, FinishReason.ERROR, error)
            self._scheduler.start_over()
            return
        self._failed_in_a_row = 0
        now = self._clock()
        self._figures.computed(spans, now - start_s)
        for span in spans:
            self._scheduler.advance(span)
        for sequence, scores in prompt_logprobs:
            sequence.prompt_logprobs += scores
        for sequence, token in zip(answering, tokens, strict=True):
            if not sequence.has_reported:
                self._figures.answered_first(sequence, now)
                self._first_tokens.add(now - sequence.arrived_s, now)
            self._append(sequence, token)

    def _append(self, sequence: Sequence, new: SampledToken | None) -> None:
        is_bad_prompt = not sequence.has_reported and None in sequence.prompt_logprobs
        if new is None or is_bad_prompt:
            self._end(sequence, FinishReason.ERROR, not_finite(sequence))
            return
        if not sequence.request.sampling.max_tokens:
            self._end(sequence, FinishReason.LENGTH)
            return
        reason = sequence.finish_reason(new.token, self._eos_token_ids)
        self._tokens_out += 1
        sequence.answer.append(new.token)
        if reason is None:
            self._outbox.put(sequence, new)
        else:
            self._end(sequence, reason, new=None if reason is FinishReason.STOP else new)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: Exception | None = None,
        new: SampledToken | None = None,
    ) -> None:
        self._outbox.put(sequence, new, reason, error)
        if self._scheduler.remove(sequence):
            self.loader.rows_freed()
