"""An engine over a tiny model, adapters from a dictionary, and answers collected request by request."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterSet, AdapterVersion
from storage.load_stages import Stage
from tests.workers.row_form.mixed_layers import random_rows
from workers.config import EngineSettings
from workers.engine.building import build_engine
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from workers.models.loading import load_base


def version(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


@dataclass(frozen=True)
class Fetched:
    rows: AdapterRows
    tier: str = "host"
    stage_s: Mapping[Stage, float] = field(default_factory=dict)


class Shelf:
    """A source of adapters: rows, or an error to raise, by version; all of them are far. Counts what is fetched."""

    def __init__(self, adapters: Mapping[AdapterVersion, AdapterRows | Exception]) -> None:
        self.adapters = dict(adapters)
        self.fetched: list[AdapterVersion] = []

    def find_near(self, wanted: AdapterVersion) -> None:
        return None

    def get(self, wanted: AdapterVersion) -> Fetched:
        self.fetched.append(wanted)
        found = self.adapters[wanted]
        if isinstance(found, Exception):
            raise found
        return Fetched(found)


def small_settings(directory: Path, **changes: Any) -> EngineSettings:
    values = {
        "base": str(directory),
        "dtype": "float64",
        "device": "cpu",
        "max_sequences": 12,
        "max_sequence_tokens": 64,
        "max_step_tokens": 48,
        "bank_rows": 64,
        "bank_slots": 16,
    }
    return EngineSettings(**{**values, **changes})


def small_engine(
    directory: Path,
    adapters: Mapping[AdapterVersion, AdapterRows | Exception] | Shelf = MappingProxyType({}),
    **changes: Any,
) -> Engine:
    source = adapters if isinstance(adapters, Shelf) else Shelf(adapters)
    return build_engine(small_settings(directory, **changes), source)


def projections(directory: Path) -> dict[str, tuple[int, int]]:
    base = load_base(str(directory), torch.float32, torch.device("cpu"))
    return {
        path: (module.in_features, module.out_features)
        for path, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and not path.endswith("lm_head")
    }


def random_adapter(
    shapes: Mapping[str, tuple[int, int]],
    family: str | Callable[[int], str],
    rank: int | Callable[[int], int],
    *,
    seed: int,
    size: float = 0.3,
) -> AdapterRows:
    """Every tensor random. Family and rank may differ from module to module, by the module's number."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, ModuleRows] = {}
    for number, (path, (num_in, num_out)) in enumerate(sorted(shapes.items())):
        kind = family if isinstance(family, str) else family(number)
        count = rank if isinstance(rank, int) else rank(number)
        rows = random_rows(kind, count, num_in, num_out, size, generator)
        if rows is not None:
            modules[path] = rows
    return AdapterRows(modules)


def prompt(seed: int, length: int, vocabulary: int = 300) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())


def greedy(
    name: str,
    tokens: tuple[int, ...],
    adapter: AdapterVersion | None = None,
    max_tokens: int = 12,
    **changes: Any,
) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **changes)
    return EngineRequest(name, tokens, sampling, AdapterSet.of(adapter))


@dataclass
class Answer:
    """All outputs of one request."""

    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.new_token_ids]

    @property
    def is_over(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error


def collect(answers: dict[str, Answer], outputs: Iterable[RequestOutput]) -> None:
    """Sort one step's outputs; nothing may follow a request's last."""
    for output in outputs:
        answer = answers.setdefault(output.request_id, Answer())
        assert not answer.is_over, f"{output} after the end"
        answer.outputs.append(output)


def run(
    engine: Engine, requests: Iterable[EngineRequest] = (), within_s: float = 60
) -> dict[str, Answer]:
    """Submit and step until every request is answered."""
    for request in requests:
        engine.submit(request)
    answers: dict[str, Answer] = {}
    end_s = time.monotonic() + within_s
    while engine.has_requests:
        assert time.monotonic() < end_s, f"still unanswered; so far {answers}"
        step = engine.step()
        collect(answers, step.outputs)
        if not step.num_tokens:
            time.sleep(0.001)  # an adapter is being loaded
    return answers
