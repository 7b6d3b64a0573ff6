"""LoRA and what PEFT keeps under its name: rsLoRA, DoRA, lora_bias, trained base biases.

y = c ∘ (W0 x + g B A x) + bias', with g = alpha/r or alpha/√r. A's rows are p, B's columns q; c is DoRA's, and bias' is
that of the settings `lora_bias` and `bias`. Source: arXiv 2106.09685, 2312.03732, 2402.09353; `peft.tuners.lora`.

Shape legend: I input features, O output features, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows
from storage.errors import AdapterRefusedError
from storage.formats.family import AdapterFile, FamilyReader, ReadModule
from storage.formats.low_rank import Sides, read_ranks, read_sides, wrong_rank
from storage.formats.module_tensors import ModuleTensors, by_module
from storage.formats.patterns import NumberPattern, checked_number
from storage.formats.peft_settings import COMMON_SETTINGS, read_switch, shown
from storage.formats.targets import Targets
from storage.formats.tensors import MAX_ABSOLUTE_VALUE

IN_PART, OUT_PART = "lora_A.weight", "lora_B.weight"
MAGNITUDE_PART = "lora_magnitude_vector"
_OWN_BIAS = "lora_B.bias"
# Where PEFT finds a base bias: inside the modules it wrapped, or in any other module.
_WRAPPED_BIAS, _PLAIN_BIAS = "base_layer.bias", "bias"
_PARTS = (IN_PART, OUT_PART, MAGNITUDE_PART, _OWN_BIAS, _WRAPPED_BIAS, _PLAIN_BIAS)

# The other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training, and the
# adapter is then relative to those.
_BEGINNINGS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Variant:
    """Which of LoRA's variants an adapter is."""

    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str  # none, all or lora_only

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        bias = settings.get("bias") or "none"
        if bias not in ("none", "all", "lora_only"):
            raise AdapterRefusedError(
                f"the setting bias={shown(bias)} is none of none, all, lora_only"
            )
        variant = cls(
            use_rslora=read_switch(settings, "use_rslora"),
            use_dora=read_switch(settings, "use_dora"),
            lora_bias=read_switch(settings, "lora_bias"),
            bias=bias,
        )
        if variant.use_dora and variant.lora_bias:
            raise AdapterRefusedError("the settings use_dora and lora_bias exclude each other")
        beginning = settings.get("init_lora_weights")
        if beginning not in _BEGINNINGS:
            raise AdapterRefusedError(
                f"the setting init_lora_weights={shown(beginning)} trains against changed base weights; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion to make it an ordinary LoRA"
            )
        return variant

    @property
    def family(self) -> str:
        return "dora" if self.use_dora else "rslora" if self.use_rslora else "lora"

    def check_parts(self, module: ModuleTensors) -> None:
        """The tensors are those that PEFT makes with these settings, no more and no fewer."""
        is_wrapped = bool(module.parts.keys() - {_PLAIN_BIAS, _WRAPPED_BIAS})
        allowed = {
            MAGNITUDE_PART: (self.use_dora, "the setting use_dora is off"),
            _OWN_BIAS: (self.lora_bias, "the setting lora_bias is off"),
            _WRAPPED_BIAS: (
                is_wrapped and self.bias != "none",
                "the setting bias=none saves none"
                if self.bias == "none"
                else f"the setting bias={self.bias} saves it for no module without LoRA weights",
            ),
            _PLAIN_BIAS: (
                not is_wrapped and self.bias == "all",
                f"the setting bias={self.bias} does not save it under this name",
            ),
        }
        for part, (is_allowed, reason) in allowed.items():
            if part in module.parts and not is_allowed:
                raise AdapterRefusedError(f"unexpected tensor {module.name(part)!r}: {reason}")


def _read(file: AdapterFile) -> tuple[str, dict[str, ReadModule]]:
    settings = file.settings
    variant = _Variant.of(settings)
    ranks = read_ranks(settings)
    alphas = NumberPattern(
        "alpha_pattern",
        settings.get("alpha_pattern"),
        checked_number("lora_alpha", settings.get("lora_alpha")),
    )
    modules, targets = {}, Targets(settings)
    for path, module in by_module("LORA", file.tensors, _PARTS).items():
        variant.check_parts(module)
        if _PLAIN_BIAS in module.parts:
            rows = ModuleRows(bias_O=module.vector(_PLAIN_BIAS))
            modules[path] = ReadModule(rows, {"bias_O": module.name(_PLAIN_BIAS)})
            continue
        sides = read_sides(module, IN_PART, OUT_PART)
        targets.check(path, sides.in_name)
        if sides.rank != ranks.of(path):
            raise wrong_rank(sides, ranks.of(path))
        gate = alphas.of(path) / (math.sqrt(sides.rank) if variant.use_rslora else sides.rank)
        if abs(gate) > MAX_ABSOLUTE_VALUE:
            raise AdapterRefusedError(
                f"the setting lora_alpha or alpha_pattern scales {path} by {gate:.3g}; at most "
                f"{MAX_ABSOLUTE_VALUE:.0f} is accepted"
            )
        modules[path] = _module(module, sides, gate, variant)
    return variant.family, modules


def _module(module: ModuleTensors, sides: Sides, gate: float, variant: _Variant) -> ReadModule:
    names = {"add_p_EI": sides.in_name, "add_q_EO": sides.out_name}
    magnitude_O = bias_shift_O = bias_O = None
    if variant.use_dora:
        magnitude_O = module.vector(MAGNITUDE_PART)
        names["magnitude_O"] = module.name(MAGNITUDE_PART)
    if variant.lora_bias:
        bias_shift_O = gate * _wide(module.vector(_OWN_BIAS))
        names["bias_shift_O"] = module.name(_OWN_BIAS)
    if _WRAPPED_BIAS in module.parts:
        bias_O = module.vector(_WRAPPED_BIAS)
        names["bias_O"] = module.name(_WRAPPED_BIAS)
        if bias_shift_O is not None:
            _check_lengths(module, bias_O, bias_shift_O)
            bias_O, bias_shift_O = _wide(bias_O) + bias_shift_O, None
    rows = ModuleRows(
        add_p_EI=sides.in_RI,
        add_q_EO=sides.out_RO,
        add_gate=gate,
        magnitude_O=magnitude_O,
        bias_shift_O=bias_shift_O,
        bias_O=bias_O,
    )
    return ReadModule(rows, names)


def _check_lengths(module: ModuleTensors, bias_O: Tensor, shift_O: Tensor) -> None:
    if bias_O.shape != shift_O.shape:
        raise AdapterRefusedError(
            f"tensors {module.name(_WRAPPED_BIAS)!r} and {module.name(_OWN_BIAS)!r} have {len(bias_O)} and "
            f"{len(shift_O)} values"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


READER = FamilyReader(
    peft_type="LORA",
    settings=COMMON_SETTINGS
    | {
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "bias"),
        *("lora_bias", "layers_to_transform", "layers_pattern", "init_lora_weights"),
        # How the adapter was trained or is to be run by PEFT.
        *("lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        *("megatron_core", "qalora_group_size", "runtime_config"),
    },
    read=_read,
)
