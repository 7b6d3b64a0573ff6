"""All that is settled before a worker starts: the base is there, the data is tokenised, every adapter has a worker.

No Ray, no model weights in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from storage.base_checkpoint import BaseFacts, read_base_facts
from storage.config import StorageSettings
from storage.errors import SpecificationError
from training.adapter_run import AdapterData
from training.config import TrainingSettings
from training.example_stream import mixed_seed
from training.examples import Example, read_examples
from training.initial_rows import check_targets
from training.job_memory import trainer_limits
from training.spec import AdapterSpec, TrainingSpec
from training.tokens import TokenisedSet, tokenise
from workers.models.loading import find_base, load_config, load_tokenizer


@dataclass(frozen=True)
class JobPlan:
    """`shares[w]` are the adapters of worker w, by name; every worker has at least one."""

    spec: TrainingSpec
    base: BaseFacts
    data: Mapping[str, AdapterData]
    num_steps: Mapping[str, int]
    shares: tuple[tuple[str, ...], ...]


def plan_job(
    spec: TrainingSpec, settings: TrainingSettings, storage: StorageSettings | None = None
) -> JobPlan:
    """Read and tokenise everything a job needs, and see that every worker's share fits in its memory.

    Args:
        storage: how a base model in S3 is reached.

    Raises:
        SpecificationError: names the adapter, the file or the module.
        InvalidRequestError: there is no such base model.
    """
    directory = find_base(spec.base, storage)
    base = read_base_facts(directory, spec.base_id)
    tokenizer = load_tokenizer(str(directory))
    config = load_config(str(directory))
    stop_ids = _stop_ids(config, directory, tokenizer)
    data: dict[str, AdapterData] = {}
    for adapter in spec.adapters:
        check_targets(adapter, base.projections)
        _check_length(adapter, config)
        data[adapter.name] = _adapter_data(adapter, tokenizer, stop_ids)
    num_steps = {
        adapter.name: adapter.num_steps(len(data[adapter.name].training))
        for adapter in spec.adapters
    }
    costs = {
        adapter.name: adapter_cost(adapter, data[adapter.name], num_steps[adapter.name])
        for adapter in spec.adapters
    }
    shares = share_out(costs, settings.num_workers)
    for share in shares:
        some = [adapter for adapter in spec.adapters if adapter.name in share]
        trainer_limits(config, some, data, getattr(torch, spec.dtype), settings)
    return JobPlan(spec, base, data, num_steps, shares)


def adapter_cost(spec: AdapterSpec, data: AdapterData, num_steps: int) -> float:
    """Base-GEMM rows of the whole training: tokens × (1 + rank)."""
    tokens = sum(len(sequence.tokens) for sequence in data.training) / len(data.training)
    return tokens * spec.batch_size * num_steps * (1 + spec.rank)


def share_out(costs: Mapping[str, float], num_workers: int) -> tuple[tuple[str, ...], ...]:
    """Longest first, each to the worker with least to do. Fewer workers if there are fewer adapters."""
    shares: list[list[str]] = [[] for _ in range(min(num_workers, len(costs)))]
    load = [0.0] * len(shares)
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        worker = load.index(min(load))
        shares[worker].append(name)
        load[worker] += costs[name]
    return tuple(tuple(share) for share in shares)


def _adapter_data(
    spec: AdapterSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> AdapterData:
    def tokenised(examples: Sequence[Example]) -> TokenisedSet:
        return tokenise(
            examples,
            tokenizer,
            stop_ids=stop_ids,
            max_tokens=spec.sequence_length,
            name=spec.name,
            loss=spec.loss,
        )

    examples: Sequence[Example] = read_examples(spec.data)
    held_out: Sequence[Example] = ()
    if spec.evaluation is not None and spec.evaluation.data is not None:
        held_out = read_examples(spec.evaluation.data)
    elif spec.evaluation is not None and spec.evaluation.fraction is not None:
        examples, held_out = _divided(examples, spec, spec.evaluation.fraction)
    training = tokenised(examples)
    return AdapterData(
        training=training.sequences,
        held_out=tokenised(held_out).sequences if held_out else (),
        truncated=training.truncated,
        dropped=training.dropped,
    )


def _divided(
    examples: Sequence[Example], spec: AdapterSpec, fraction: float
) -> tuple[Sequence[Example], Sequence[Example]]:
    """A random part is held out, the same for the same seed."""
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise SpecificationError(
            f"{spec.name}: {len(examples)} examples are too few to hold some out",
            param="evaluation.fraction",
        )
    assert spec.seed is not None
    generator = torch.Generator().manual_seed(mixed_seed(spec.seed, "held out"))
    order = torch.randperm(len(examples), generator=generator).tolist()
    held_out = set(order[:count])
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [examples[index] for index in sorted(held_out)],
    )


def _check_length(spec: AdapterSpec, config: PretrainedConfig) -> None:
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and spec.sequence_length > longest:
        raise SpecificationError(
            f"{spec.name}: sequence_length {spec.sequence_length} is more than the model's {longest} positions",
            param="sequence_length",
        )


def _stop_ids(
    config: PretrainedConfig, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Every token that ends an answer, as serving sees it."""
    sources: list[Any] = [config.get_text_config(decoder=True), tokenizer]
    if (directory / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(directory))
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not found:
        raise SpecificationError(
            f"{directory.name} names no token that ends an answer", param="base"
        )
    return frozenset(found)
