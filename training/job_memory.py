"""What one trainer's adapters need of memory: the base from its configuration, the adapters from their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from training.activation_memory import ActivationBytes, measure_activations
from training.adapter_run import AdapterData
from training.config import TrainingSettings
from training.frozen_base import FrozenBase
from training.initial_rows import row_layouts
from training.memory_model import (
    AdapterNeeds,
    BaseShape,
    StepLimits,
    estimated_activations,
    plan_steps,
)
from training.spec import AdapterSpec
from workers.machine_memory import usable_memory
from workers.models.loading import LoadedBase
from workers.models.wrapping import linear_layers

_SHARE_OF_MACHINE = 0.5
_SHARE_OF_GPU = 0.9


@dataclass(frozen=True, eq=False)
class FittedBase:
    """A base ready to train any of a job's adapters, and what their activations were measured to take on it."""

    base: FrozenBase
    _config: PretrainedConfig
    _kept: ActivationBytes
    _settings: TrainingSettings

    @classmethod
    def adopt(
        cls,
        loaded: LoadedBase,
        adapters: Sequence[AdapterSpec],
        data: Mapping[str, AdapterData],
        settings: TrainingSettings,
    ) -> Self:
        """Raises as `trainer_limits` and `FrozenBase.adopt`."""
        config, dtype = loaded.model.config, loaded.model.dtype
        limits = trainer_limits(config, adapters, data, dtype, settings)
        checkpoint = limits is not None and limits.checkpoint_activations
        base = FrozenBase.adopt(
            loaded,
            max_tokens=max(one.sequence_length for one in adapters),
            checkpoint_activations=checkpoint,
        )
        kept = measure_activations(base, max(adapters, key=lambda one: one.rank))
        decided = settings.model_copy(update={"checkpoint_activations": checkpoint})
        return cls(base, config, kept, decided)

    def limits(
        self, adapters: Sequence[AdapterSpec], data: Mapping[str, AdapterData]
    ) -> StepLimits | None:
        """As `trainer_limits`, of some of the adapters."""
        return trainer_limits(
            self._config, adapters, data, self.base.dtype, self._settings, self._kept
        )


def trainer_limits(
    config: PretrainedConfig,
    adapters: Sequence[AdapterSpec],
    data: Mapping[str, AdapterData],
    dtype: torch.dtype,
    settings: TrainingSettings,
    kept: ActivationBytes | None = None,
) -> StepLimits | None:
    """How one trainer of these adapters shall go about it; None where the budget is not known here.

    Args:
        kept: measured on the model, where there is one; else estimated.

    Raises:
        SpecificationError: one of them cannot train in the budget.
    """
    budget = memory_budget(settings)
    if budget is None:
        return None
    base = base_shape(config, dtype)
    needs = [adapter_needs(base, adapter, data[adapter.name]) for adapter in adapters]
    wanted = None if settings.checkpoint_activations == "auto" else settings.checkpoint_activations
    return plan_steps(
        base,
        needs,
        kept or estimated_activations(base, needs),
        budget=budget,
        max_step_tokens=settings.max_step_tokens,
        checkpoint=wanted if base.can_checkpoint else bool(wanted),
    )


def memory_budget(settings: TrainingSettings) -> int | None:
    """Bytes for one worker; None where only the worker can tell: on a GPU, when this machine has none."""
    if settings.memory_bytes:
        return settings.memory_bytes
    if not settings.gpus_per_worker:
        return int(_SHARE_OF_MACHINE * usable_memory() / settings.num_workers)
    if not torch.cuda.is_available():
        return None
    return int(_SHARE_OF_GPU * torch.cuda.get_device_properties(0).total_memory)


def base_shape(config: PretrainedConfig, dtype: torch.dtype) -> BaseShape:
    """What a model of this configuration takes, with none in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    linears = linear_layers(model)
    text = config.get_text_config(decoder=True)
    return BaseShape(
        parameters=sum(one.numel() for one in model.parameters()),
        dtype=dtype,
        projections={
            path: (module.in_features, module.out_features)
            if isinstance(module, torch.nn.Linear)
            else (module.nx, module.nf)
            for path, module in linears.items()
        },
        biased=frozenset(path for path, module in linears.items() if module.bias is not None),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        can_checkpoint=any(isinstance(one, GradientCheckpointingLayer) for one in model.modules()),
    )


def adapter_needs(base: BaseShape, spec: AdapterSpec, data: AdapterData) -> AdapterNeeds:
    """Of one adapter over its own data, held-out sequences too."""
    training = [len(one.tokens) - 1 for one in data.training]
    longest = max([*training, *(len(one.tokens) - 1 for one in data.held_out)])
    return AdapterNeeds(
        name=spec.name,
        layouts=row_layouts(spec, base.projections, base.biased),
        longest_tokens=longest,
        step_tokens=max(1, round(sum(training) / len(training) * spec.batch_size)),
        most_tokens=longest * spec.batch_size,
    )
