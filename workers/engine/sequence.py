"""One request while it is in the engine. Changed by the scheduler and the engine only, on the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.identity import AdapterVersion
from workers.engine.prefix_keys import PrefixKeys
from workers.engine.request import EngineRequest, FinishReason, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and answer so far, and what it holds. Times are on the engine's own clock."""

    request: EngineRequest
    arrived_s: float
    deadline_s: float | None = None
    admitted_s: float | None = None
    bank_slot: int | None = (
        None  # with a reference to its adapter; None: the base model, or not yet
    )
    kv_slot: int | None = None  # None: not running
    blocks: list[int] = field(default_factory=list)  # of the KV cache, in the order of its tokens
    num_computed: int = 0  # tokens in the KV cache
    num_served: int = 0  # tokens it was charged for, or found in the cache when it first ran
    num_reused: int = 0  # tokens it found in the cache when it first ran
    ticket: int | None = (
        None  # its place among all that were ever admitted; kept when it is preempted
    )
    prefix_keys: PrefixKeys | None = None
    answer: list[int] = field(default_factory=list)
    # Of its second token, its third and so on, as far as they are known; None where a logit was not finite.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    tier: str | None = None  # where its adapter came from
    needed_load: bool = False  # its adapter was not resident when it was first looked for
    has_reported: bool = False  # its first output is out

    @property
    def version(self) -> AdapterVersion | None:
        return self.request.adapters.version

    @property
    def is_held(self) -> bool:
        """Nothing is wanting but a KV slot: it uses no adapter, or has its reference."""
        return self.version is None or self.bank_slot is not None

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.answer)

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not in the KV cache yet."""
        return self.num_tokens - self.num_computed

    def pending(self, count: int) -> list[int]:
        """The first `count` of them."""
        prompt = self.request.prompt_token_ids
        start, stop = self.num_computed, self.num_computed + count
        if start >= len(prompt):
            return self.answer[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.answer[: max(0, stop - len(prompt))]]

    def scored_prompt(self) -> tuple[TokenLogprobs, ...] | None:
        """The log-probabilities of the prompt, where they were asked for."""
        if not self.request.wants_prompt_logprobs:
            return None
        return tuple(one for one in self.prompt_logprobs if one is not None)

    def scoring_positions(self, num_new: int) -> range:
        """Where among its next tokens the logits tell how probable a token of the prompt is.

        The logits at position p are about the token at p + 1. Nothing is scored twice if it is computed again.
        """
        if not self.request.wants_prompt_logprobs:
            return range(0)
        last = len(self.request.prompt_token_ids) - 1
        start = max(self.num_computed, len(self.prompt_logprobs))
        return range(start, min(self.num_computed + num_new, last))

    @property
    def work_left(self) -> float:
        """Rank-weighted tokens it may still take."""
        sampling = self.request.sampling
        left = self.num_pending + sampling.max_tokens - len(self.answer)
        return left * self.request.work_per_token

    def finish_reason(self, token: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """What appending `token` would end the answer with, if it does. Before min_tokens no stop token is sampled."""
        if token in self.stop_token_ids(eos_token_ids):
            return FinishReason.STOP
        if len(self.answer) + 1 >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def stop_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        sampling = self.request.sampling
        if sampling.ignore_eos:
            return sampling.stop_token_ids
        return sampling.stop_token_ids | eos_token_ids
