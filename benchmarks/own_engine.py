"""Our engine as one side of a comparison: a batch in, answers and the time they took out. No HTTP, no Ray."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from storage.adapter_cache import CachedAdapter
from storage.adapter_rows import AdapterRows
from storage.errors import UnknownModelError
from storage.identity import AdapterSet, AdapterVersion
from workers.config import EngineSettings
from workers.engine.building import build_engine
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, SamplingParams

# While every request waits for its adapter: what a served engine's thread would sleep through.
_IDLE_S = 0.001


@dataclass(frozen=True, slots=True)
class Answered:
    """One batch: the answers in the order of the requests, and the seconds from the first submit to the last token."""

    seconds: float
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.answers)) / self.seconds


def first_token_agreement(one: Sequence[Answered], other: Sequence[Answered]) -> float:
    """The share of requests whose answers begin with the same token; in bfloat16 two engines part soon after."""
    return mean(
        a[0] == b[0]
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left.answers, right.answers, strict=True)
    )


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A source of exactly these adapters."""

    adapters: Mapping[AdapterVersion, AdapterRows]

    def find_near(self, version: AdapterVersion) -> CachedAdapter:
        if version not in self.adapters:
            raise UnknownModelError(f"no adapter {version}")
        return CachedAdapter(self.adapters[version], "host")

    get = find_near


class OwnEngine:
    """Steps an engine from this thread, and counts the time it spends there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds = 0.0
        self.tiers: Counter[str] = Counter()  # where the batch's requests found their adapters
        self._answers: dict[str, list[int]] = {}
        self._to_come: deque[EngineRequest] = deque()
        self._batches = 0

    @classmethod
    def with_adapters(
        cls, settings: EngineSettings, adapters: Mapping[AdapterVersion, AdapterRows]
    ) -> OwnEngine:
        """An engine that knows exactly these adapters; they come from memory. Raises as `build_engine`."""
        return cls(build_engine(settings, _InMemory(adapters)))

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        versions: Sequence[AdapterVersion | None],
        answer_tokens: int,
        concurrency: int | None = None,
    ) -> None:
        """Begin a batch: greedy, each answer of exactly so many tokens.

        Args:
            concurrency: the requests in the engine at a time, the next one coming when one is answered; None: all.
        """
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        self._batches += 1
        self.seconds, self.tiers = 0.0, Counter()
        requests = [
            EngineRequest(
                f"{self._batches}-{number}", tuple(prompt), sampling, AdapterSet.of(version)
            )
            for number, (prompt, version) in enumerate(zip(prompts, versions, strict=True))
        ]
        self._answers = {request.request_id: [] for request in requests}
        self._to_come = deque(requests)
        began = time.perf_counter()
        self._submit(len(requests) if concurrency is None else concurrency)
        self.seconds += time.perf_counter() - began

    def step(self) -> bool:
        """One engine step; false once the batch is answered. Raises the error of a request that failed."""
        began = time.perf_counter()
        done = self.engine.step()
        for output in done.outputs:
            if output.error is not None:
                raise output.error
            self._answers[output.request_id] += output.new_token_ids
            self.tiers.update([output.adapter_tier] if output.adapter_tier else [])
        self._submit(sum(output.finish_reason is not None for output in done.outputs))
        if not done.num_tokens and self.engine.has_requests:
            time.sleep(_IDLE_S)
        self.seconds += time.perf_counter() - began
        return self.engine.has_requests

    def answered(self) -> Answered:
        """The batch so far."""
        return Answered(self.seconds, tuple(map(tuple, self._answers.values())))

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        versions: Sequence[AdapterVersion | None],
        answer_tokens: int,
        concurrency: int | None = None,
    ) -> Answered:
        """`begin`, and all its steps."""
        self.begin(prompts, versions, answer_tokens, concurrency)
        while self.step():
            pass
        return self.answered()

    def close(self) -> None:
        self.engine.loader.stop()

    def _submit(self, count: int) -> None:
        for _ in range(min(count, len(self._to_come))):
            self.engine.submit(self._to_come.popleft())
