"""What the sampler is told of one row of logits, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row's token is chosen, and the position it will have in its sequence.

    `prompt` and `answer` are the tokens so far, for penalties; they are read during the call only.
    """

    params: SamplingParams
    position: int
    forbidden: frozenset[int] = frozenset()
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()

    @property
    def changes_logits(self) -> bool:
        params = self.params
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1.0
            or (params.counts_answer and self.answer)
            or self.forbidden
        )


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's token, with its log-probabilities where they were asked for."""

    token: int
    logprobs: TokenLogprobs | None = None
