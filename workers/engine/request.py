"""What goes into the engine and what comes out: plain frozen data that crosses threads and processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum

from storage.errors import InvalidRequestError
from storage.identity import DEFAULT_TENANT, AdapterSet

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MIN_TEMPERATURE = 1e-5


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"
    ABORT = "abort"  # the client went away, or a deadline passed
    ERROR = "error"  # its adapter could not be loaded, or its step failed; `RequestOutput.error` says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, in OpenAI's names, and in vLLM's where OpenAI has none.

    The model's logits are changed in this order, which is vLLM's:

    1. `logit_bias` is added.
    2. Tokens of the prompt or the answer: a positive logit is divided by `repetition_penalty`, a negative one
       multiplied with it.
    3. Tokens of the answer lose `frequency_penalty` for each time they are in it, and `presence_penalty` once.
    4. Up to `min_tokens`, tokens that would end the answer are out.
    5. A greedy answer takes the best token, the one with the lowest id of several. Any other divides by
       `temperature`, drops tokens less probable than `min_p` times the best one, keeps the best `top_k`, keeps of
       those the best that together have `top_p` of their probability, and draws.

    Log-probabilities are the model's own, before all of this.

    A draw depends on `seed` and the token's position only, so an answer is the same in whatever batch it is made.
    """

    max_tokens: int = 16  # 0: nothing is answered, the prompt is only computed
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[
        tuple[int, float], ...
    ] = ()  # (token, what is added to its logit), each token once
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = (
        None  # so many of the best tokens beside each chosen one; None: no logprobs
    )
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "from 0 to 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "from 0.01 to 100"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS,
                f"from 0 to {MAX_LOGPROBS}",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise InvalidRequestError(
                    f"{name} must be {rule}, not {getattr(self, name)}", param=name
                )
        if len(dict(self.logit_bias)) < len(self.logit_bias) or not all(
            -MAX_BIAS <= bias <= MAX_BIAS for _, bias in self.logit_bias
        ):
            raise InvalidRequestError(
                f"logit_bias takes each token once, with a bias from -{MAX_BIAS:.0f} to {MAX_BIAS:.0f}",
                param="logit_bias",
            )

    @property
    def is_greedy(self) -> bool:
        """A temperature so low that nothing but the best token would be drawn counts as 0."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def counts_answer(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def of_choice(self, index: int) -> SamplingParams:
        """The parameters of one of several answers to a prompt: they differ in their seed.

        The first answer has the request's own seed. The seed of answer i > 0 is the first 63 bits of
        BLAKE2b("<seed>/<i>"), decimal numbers.
        """
        if index == 0:
            return self
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request from the ingress to the engine, never re-parsed on its way.

    `work_per_token` is the rank-weighted cost of a token: 1 for the base model, 1 + the adapter's largest rank else.
    `deadline_s` is seconds on the clock of `time.time()`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: AdapterSet = field(default_factory=AdapterSet)
    tenant: str = DEFAULT_TENANT
    deadline_s: float | None = None
    trace_id: str | None = None
    work_per_token: float = 1.0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Every token of the prompt has to be computed: none may be taken from a prefix cache."""
        return self.sampling.prompt_logprobs is not None

    @property
    def work(self) -> float:
        """Rank-weighted tokens this request may take in all."""
        return (len(self.prompt_token_ids) + self.sampling.max_tokens) * self.work_per_token


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable the model found the token at one position: natural logarithms, before any sampling parameter.

    `top` are the most probable tokens there, the best first, as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request. `adapters` is the set that really computed it.

    The token that stopped an answer is not part of it. Exactly one output of a request has a finish reason: its last.
    Where they were asked for, `new_logprobs` has one entry for each new token, and the first output has
    `prompt_logprobs`, one entry for each token of the prompt but the first.
    """

    request_id: str
    adapters: AdapterSet
    new_token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    adapter_tier: str | None = (
        None  # where the adapter came from: device, host, disk, registry; first output only
    )
    queue_time_s: float | None = None  # first output only
    new_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the KV cache; first output only


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """All that one step produced."""

    outputs: tuple[RequestOutput, ...]
    num_tokens: int = 0
