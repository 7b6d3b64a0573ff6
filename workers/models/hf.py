"""Any transformers causal model as a `ModelRunner`: its own files unedited, its linear layers wrapped, our attention.

All sequences of a step stand in one row of tokens, [1, T], with their own positions; which keys a token may see is the
attention back end's business. This is the reference every faster runner is tested against.

Shape legend: T tokens in the step, L positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from workers.attention.building import build_attention
from workers.bank.bank import AdapterBank
from workers.config import EngineSettings
from workers.models.arithmetic import Arithmetic, choose_arithmetic
from workers.models.attention_hook import BACKEND_ARGUMENT, adopt_attention
from workers.models.loading import LoadedBase
from workers.models.memory_fit import fit_memory
from workers.models.runner import ModelShape, StepInput
from workers.models.wrapping import wrap_linears
from workers.row_form.cost import ROW_MODE, CostModel
from workers.row_form.cost_measurement import measure_cost


class HfRunner:
    """Takes the base over: its model is changed in place and must not be used otherwise from now on.

    `settings` are those given, with every size named; `memory` is what they take.

    Raises:
        InvalidRequestError: the model needs something the engine does not have; says what.
    """

    def __init__(
        self, base: LoadedBase, settings: EngineSettings, arithmetic: Arithmetic | None = None
    ) -> None:
        model = base.model
        config = model.config.get_text_config(decoder=True)
        own_limit = getattr(config, "max_position_embeddings", settings.max_sequence_tokens)
        max_tokens = min(settings.max_sequence_tokens, own_limit)
        num_kv_heads, head_dim = adopt_attention(model, max_tokens)
        self._model = model
        self._base_digest = base.digest
        self._arithmetic = arithmetic or choose_arithmetic(
            model.dtype, model.device, head_dim=head_dim, compiled=settings.compiled
        )
        self._layers = wrap_linears(
            model,
            ROW_MODE,
            product=self._arithmetic.product,
            look_up=self._arithmetic.look_up,
            make_linear=self._arithmetic.make_linear,
        )
        if not settings.deterministic:
            self._layers.use_cost(self._arithmetic.cost or self._measured_cost())
        self._shape = ModelShape(
            vocab_size=config.vocab_size,
            max_positions=max_tokens,
            num_layers=config.num_hidden_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            projections=self._layers.projections,
            eos_token_ids=_eos_token_ids(model, config),
        )
        self.settings, self.memory = fit_memory(settings, self._shape, model.dtype, model.device)
        self._attention = build_attention(
            self.settings,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_tokens=max_tokens,
            dtype=model.dtype,
            device=model.device,
            loops=self._arithmetic.slabs,
            has_kernels=self._arithmetic.has_kernels,
        )

    def _measured_cost(self) -> CostModel:
        bases = [layer.base for layer in self._layers.layers.values()]
        largest = max(bases, key=lambda base: base.in_features * base.out_features)
        return measure_cost(largest, thin_products=self._arithmetic.epilogue is None)

    @property
    def shape(self) -> ModelShape:
        return self._shape

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def base_digest(self) -> str:
        return self._base_digest

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """Base biases by projection, where there is one: what a bank needs for adapters that change them."""
        return self._layers.biases

    def base_weight(self, path: str) -> Tensor:
        """A projection's base weight_OI: what a bank measures for DoRA."""
        return self._layers.base_weight(path)

    def bind(self, bank: AdapterBank) -> None:
        """Take adapters' rows from this bank from the next step on."""
        self._layers.bind(bank)

    def forward(self, step: StepInput) -> Tensor:
        self._attention.begin_step(step.spans, step.kv_saves, step.kv_restores)
        self._layers.begin_step(step.plan)
        with torch.inference_mode():
            logits_LV = self._logits(step)
            return logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32))

    def _logits(self, step: StepInput) -> Tensor:
        """logits_LV of this step, in the model's type."""
        output = self._model(
            input_ids=step.token_ids_T[None],
            position_ids=step.positions_T[None],
            use_cache=False,
            logits_to_keep=step.logits_of_L,
            **{BACKEND_ARGUMENT: self._attention},
        )
        logits_LV: Tensor = output.logits[0]
        return logits_LV


def _eos_token_ids(model: PreTrainedModel, config: PretrainedConfig) -> frozenset[int]:
    """Every token that ends an answer: generation settings name more of them than the model's configuration."""
    ids: set[int] = set()
    for source in (model.generation_config, config):
        one_or_more = getattr(source, "eos_token_id", None)
        if one_or_more is not None:
            ids.update(one_or_more if isinstance(one_or_more, list) else [one_or_more])
    return frozenset(ids)
