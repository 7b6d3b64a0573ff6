"""Which tokens of the running sequences a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSpan:
    """The next tokens of one sequence. Logits are wanted where they complete what is known of it."""

    sequence: Sequence
    num_new: int

    @property
    def wants_logits(self) -> bool:
        return self.num_new == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may take.

    Decoding sequences have their token each, whatever it costs. Prompts share what is left of both limits, so that a
    prompt of a high rank, whose tokens are many times a base token's work, cannot keep the others' next tokens waiting.
    """

    max_tokens: int
    max_work: int  # rank-weighted tokens
    least_tokens: int  # of the first prompt: decoding alone may be all the work of a step

    def fill(
        self,
        running: Iterable[Sequence],
        turn: Callable[[Sequence], tuple[tuple[float, ...], int]],
    ) -> list[ScheduledSpan]:
        """Decoding sequences by KV slot, so that they form one batch; then prompts in the order of `turn`."""
        by_slot = sorted(running, key=lambda one: one.kv_slot or 0)
        # decode
        decode = [one for one in by_slot if one.num_pending == 1]
        spans = [ScheduledSpan(one, 1) for one in decode]
        tokens = self.max_tokens - len(spans)
        work = self.max_work - sum(one.request.work_per_token for one in decode)
        # prefill
        prompts = sorted((one for one in by_slot if one.num_pending > 1), key=turn)
        least = self.least_tokens
        for one in prompts:
            affordable = max(int(work // one.request.work_per_token), least)
            num_new = min(one.num_pending, tokens, affordable)
            if num_new <= 0:
                continue
            spans.append(ScheduledSpan(one, num_new))
            tokens -= num_new
            work -= num_new * one.request.work_per_token
            least = 0
        return spans
