"""What goes into the engine and what comes out: plain frozen data that crosses threads and processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from storage.errors import InvalidRequestError
from storage.identity import DEFAULT_TENANT, AdapterSet


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"
    ABORT = "abort"  # the client went away, or a deadline passed
    ERROR = "error"  # its adapter could not be loaded, or its step failed; `RequestOutput.error` says why


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are OpenAI's, except that a seed is always recorded.

    Temperature 0 is greedy. The order is temperature, top-k, top-p, as in the field's other engines.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "from 0 to 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise InvalidRequestError(
                    f"{name} must be {rule}, not {getattr(self, name)}", param=name
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


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
    def work(self) -> float:
        """Rank-weighted tokens this request may take in all."""
        return (len(self.prompt_token_ids) + self.sampling.max_tokens) * self.work_per_token


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request. `adapters` is the set that really computed it.

    The token that stopped an answer is not part of it. Exactly one output of a request has a finish reason: its last.
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


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """All that one step produced."""

    outputs: tuple[RequestOutput, ...]
    num_tokens: int = 0
    duration_s: float = 0.0
