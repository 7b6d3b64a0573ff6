"""All that is settled before a worker starts: the base is there, the data is tokenised, every adapter has its cost.

No Ray, no model weights in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from storage.base_checkpoint import BaseFacts, read_base_facts
from storage.config import StorageSettings
from storage.errors import SpecificationError
from storage.identity import canonical_json
from training.adapter_run import AdapterData
from training.config import TrainingSettings
from training.example_stream import mixed_seed
from training.examples import Example, read_examples
from training.initial_rows import check_targets
from training.job_memory import trainer_limits
from training.spec import AdapterSpec, TrainingSpec
from training.tokens import TokenisedSet, tokenise
from workers.models.loading import find_base, load_config, load_tokenizer
from workers.row_form.cost import training_cost


@dataclass(frozen=True)
class JobPlan:
    """Adapters by name: their data, their optimizer steps, and what training them costs (`adapter_cost`)."""

    spec: TrainingSpec
    base: BaseFacts
    data: Mapping[str, AdapterData]
    num_steps: Mapping[str, int]
    costs: Mapping[str, float]

    def digest(self) -> str:
        """Of everything that decides what the adapters become: tokens, settings, base. Not of where files lie."""
        job = [self.base.digest, self.spec.dtype, self.spec.tenant]
        if self.spec.deterministic:
            job.append("deterministic")
        hashed = hashlib.sha256(canonical_json(job))
        for adapter in self.spec.adapters:
            settings = adapter.model_dump(
                mode="json", exclude={"data": True, "evaluation": {"data"}, "may_replace": True}
            )
            hashed.update(canonical_json(settings))
            data = self.data[adapter.name]
            for sequence in (*data.training, None, *data.held_out):
                hashed.update(repr(sequence).encode())
        return hashed.hexdigest()


def check_base(
    spec: TrainingSpec, storage: StorageSettings | None = None
) -> tuple[Path, BaseFacts, PretrainedConfig]:
    """The base model's directory, facts and configuration, which fit all adapters. Takes seconds: data is not read.

    Raises:
        SpecificationError: names the adapter, and the module or the length.
        InvalidRequestError: there is no such base model.
    """
    directory = find_base(spec.base, storage)
    base = read_base_facts(directory, spec.base_id)
    config = load_config(str(directory))
    for adapter in spec.adapters:
        check_targets(adapter, base.projections)
        _check_length(adapter, config)
    return directory, base, config


def plan_job(
    spec: TrainingSpec, settings: TrainingSettings, storage: StorageSettings | None = None
) -> JobPlan:
    """Read and tokenise everything a job needs, and see that any adapter fits in the memory of any worker.

    Args:
        storage: how a base model in S3 is reached.

    Raises:
        SpecificationError: names the adapter, the file or the module.
        InvalidRequestError: there is no such base model.
    """
    directory, base, config = check_base(spec, storage)
    tokenizer = load_tokenizer(str(directory))
    stop_ids = _stop_ids(config, directory, tokenizer)
    data = {adapter.name: _adapter_data(adapter, tokenizer, stop_ids) for adapter in spec.adapters}
    num_steps = {
        adapter.name: adapter.num_steps(len(data[adapter.name].training))
        for adapter in spec.adapters
    }
    dtype = getattr(torch, spec.dtype)
    costs = {
        adapter.name: adapter_cost(adapter, data[adapter.name], num_steps[adapter.name], dtype)
        for adapter in spec.adapters
    }
    trainer_limits(config, spec.adapters, data, dtype, settings)
    return JobPlan(spec, base, data, num_steps, costs)


def adapter_cost(spec: AdapterSpec, data: AdapterData, num_steps: int, dtype: torch.dtype) -> float:
    """Of the whole training, in base-GEMM rows as `CostModel` counts them. What LoRA's thin rows cost is left out."""
    tokens = sum(len(sequence.tokens) for sequence in data.training) / len(data.training)
    num_mul = spec.rank if spec.family == "flora" else 0
    cost = training_cost(dtype)
    return num_steps * cost.rows(round(tokens * spec.batch_size), num_mul, spec.offset)


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
