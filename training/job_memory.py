"""What one trainer's adapters need of memory: the base from its configuration, the adapters from their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from storage.errors import SpecificationError
from training.activation_bytes import RunBytes
from training.activation_memory import measure_run
from training.adapter_run import AdapterData
from training.config import TrainingSettings
from training.frozen_base import FrozenBase
from training.initial_rows import row_layouts
from training.memory_model import (
    AdapterNeeds,
    BaseShape,
    StepLimits,
    activation_bytes,
    estimated_runs,
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
    """A base ready to train any of a job's adapters, and what their runs were measured to keep on it."""

    base: FrozenBase
    _config: PretrainedConfig
    _runs: Mapping[str, RunBytes]
    _settings: TrainingSettings

    @classmethod
    def adopt(
        cls, loaded: LoadedBase, adapters: Sequence[AdapterSpec], settings: TrainingSettings
    ) -> Self:
        """Raises as `FrozenBase.adopt`."""
        config = loaded.model.config
        base = FrozenBase.adopt(loaded, max_tokens=max(one.sequence_length for one in adapters))
        return cls(base, config, _measured_runs(base, adapters), settings)

    def fit(
        self, adapters: Sequence[AdapterSpec], data: Mapping[str, AdapterData]
    ) -> StepLimits | None:
        """Make the base ready for a trainer of some of the adapters; None where the budget is not known here.

        Whom `trainer_limits` admitted by the estimate, nobody refuses for what was measured: to start a worker again
        would not help.

        Raises:
            SpecificationError: as it did.
        """

        def limits(runs: Mapping[str, RunBytes] | None) -> StepLimits | None:
            return trainer_limits(
                self._config, adapters, data, self.base.dtype, self._settings, runs
            )

        try:
            found = limits(self._runs)
        except SpecificationError:
            found = limits(None)
        wanted = self._settings.checkpoint_activations is True
        self.base.checkpoint_activations(found.checkpoint_activations if found else wanted)
        return found


def _measured_runs(base: FrozenBase, adapters: Sequence[AdapterSpec]) -> dict[str, RunBytes]:
    """By adapter; those of one shape are alike."""
    measured: dict[object, RunBytes] = {}
    runs = {}
    for one in adapters:
        layouts = row_layouts(one, base.layers.projections, base.layers.biases)
        shape = frozenset(layouts.items())
        if shape not in measured:
            measured[shape] = measure_run(base, one)
        runs[one.name] = measured[shape]
    return runs


def trainer_limits(
    config: PretrainedConfig,
    adapters: Sequence[AdapterSpec],
    data: Mapping[str, AdapterData],
    dtype: torch.dtype,
    settings: TrainingSettings,
    runs: Mapping[str, RunBytes] | None = None,
) -> StepLimits | None:
    """How one trainer of these adapters shall go about it; None where the budget is not known here.

    Args:
        runs: what theirs keep, by name, measured on the model where there is one; else estimated.

    Raises:
        SpecificationError: one of them cannot train in the budget, or activations cannot be made again as it is wanted.
    """
    base = base_shape(config, dtype)
    wanted = None if settings.checkpoint_activations == "auto" else settings.checkpoint_activations
    if wanted and not base.can_checkpoint:
        raise SpecificationError(
            f"a model of type {config.model_type} does not say which of its modules are its layers, so their "
            "activations cannot be computed again; set training.checkpoint_activations to auto or false",
            param="training.checkpoint_activations",
        )
    budget = memory_budget(settings)
    if budget is None:
        return None
    needs = [adapter_needs(base, adapter, data[adapter.name]) for adapter in adapters]
    return plan_steps(
        base,
        needs,
        activation_bytes(base, needs, runs or estimated_runs(base, needs)),
        budget=budget,
        max_step_tokens=settings.max_step_tokens,
        checkpoint=wanted if base.can_checkpoint else False,
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
        fewest_tokens=min(training) * spec.batch_size,
        step_tokens=max(1, round(sum(training) / len(training) * spec.batch_size)),
        most_tokens=longest * spec.batch_size,
    )
