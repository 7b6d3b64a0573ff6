"""Reads a PEFT adapter directory into rows. What it cannot read exactly it refuses by name; it ignores no tensor.

Supported: HIRA (and FLoRA in HiRA's layout) and LORA with rank_pattern, alpha_pattern and rsLoRA, on linear layers.
Layouts as written by PEFT 0.21: `base_model.model.<module path>.hira_A`, `….lora_A.weight`, and so on.

Shape legend: I input features, O output features, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError
from storage.formats import flora
from storage.formats.patterns import NumberPattern, checked_number
from storage.formats.peft_settings import check_targets, read_settings
from storage.formats.tensors import MAX_ABSOLUTE_VALUE, read_tensors

SETTINGS_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = {"HIRA": ("hira_A", "hira_B"), "LORA": ("lora_A.weight", "lora_B.weight")}
"""How a family calls the input side [R, I] and the output side [O, R] of a module."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as read.

    `tensor_names`: module path → names of its input-side and output-side tensors in the file, to tell a user which.
    """

    rows: AdapterRows
    family: str  # flora, hira or lora
    tensor_names: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Sides:
    """One module's two tensors, of matching rank."""

    names: tuple[str, str]
    in_RI: Tensor
    out_RO: Tensor

    @property
    def rank(self) -> int:
        return self.in_RI.shape[0]


def read_peft(files: Mapping[str, bytes]) -> PeftAdapter:
    """The rows of an adapter directory, in the dtype of its tensors. Needs no base model.

    Args:
        files: `adapter_config.json` and `adapter_model.safetensors`, by name.

    Raises:
        AdapterRefusedError: a file, setting or tensor that is missing, unknown, not supported or contradictory;
            names it.
    """
    _check_file_names(files)
    settings = read_settings(files[SETTINGS_FILE])
    tensors, metadata = read_tensors(TENSORS_FILE, files[TENSORS_FILE])
    sides = _pair(settings["peft_type"], tensors)
    for path, side in sides.items():
        for name in side.names:
            check_targets(settings, path, name)
    if settings["peft_type"] == "LORA":
        family, modules = "lora", _lora_modules(settings, sides)
    elif flora.OFFSET in metadata:
        family, modules = "flora", _flora_modules(sides, metadata)
    else:
        family, modules = "hira", _hira_modules(settings, sides)
    return PeftAdapter(
        AdapterRows(modules, metadata.get(flora.BASE_DIGEST)),
        family,
        {path: side.names for path, side in sides.items()},
    )


def _check_file_names(files: Mapping[str, bytes]) -> None:
    for name in (SETTINGS_FILE, TENSORS_FILE):
        if name not in files:
            raise AdapterRefusedError(
                f"the file {name} is missing; an adapter is {SETTINGS_FILE} and {TENSORS_FILE} "
                "(pickled weights are never read)"
            )
    if unexpected := sorted(set(files) - {SETTINGS_FILE, TENSORS_FILE}):
        raise AdapterRefusedError(f"unexpected file {unexpected[0]!r} in the adapter")


def _pair(peft_type: str, tensors: Mapping[str, Tensor]) -> dict[str, _Sides]:
    """Both sides of every module, by path. Every tensor belongs to one, or the adapter is refused."""
    in_suffix, out_suffix = (f".{suffix}" for suffix in SIDES[peft_type])
    paths = set()
    for name in sorted(tensors):
        suffix = next((end for end in (in_suffix, out_suffix) if name.endswith(end)), None)
        if suffix is None or not name.startswith(PREFIX):
            raise AdapterRefusedError(
                f"unexpected tensor {name!r}: a {peft_type} adapter of linear layers has only "
                f"{PREFIX}<module>{in_suffix} and {PREFIX}<module>{out_suffix}"
            )
        paths.add(name.removeprefix(PREFIX).removesuffix(suffix))
    if not paths:
        raise AdapterRefusedError(f"{TENSORS_FILE} holds no tensors")
    return {
        path: _matched(PREFIX + path + in_suffix, PREFIX + path + out_suffix, tensors)
        for path in sorted(paths)
    }


def _matched(in_name: str, out_name: str, tensors: Mapping[str, Tensor]) -> _Sides:
    for missing, present in ((in_name, out_name), (out_name, in_name)):
        if missing not in tensors:
            raise AdapterRefusedError(f"tensor {missing!r} is missing; {present!r} is there")
    in_RI, out_OR = tensors[in_name], tensors[out_name]
    for name, tensor in ((in_name, in_RI), (out_name, out_OR)):
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterRefusedError(
                f"tensor {name!r} has shape {list(tensor.shape)}; expected two dimensions, neither empty"
            )
    if in_RI.shape[0] != out_OR.shape[1]:
        raise AdapterRefusedError(
            f"tensor {out_name!r} has shape {list(out_OR.shape)}; expected {in_RI.shape[0]} columns, the rank of "
            f"{in_name!r}"
        )
    return _Sides((in_name, out_name), in_RI, out_OR.T.contiguous())


def _lora_modules(
    settings: Mapping[str, Any], sides: Mapping[str, _Sides]
) -> dict[str, ModuleRows]:
    ranks = _ranks(settings)
    alphas = NumberPattern(
        "alpha_pattern",
        settings.get("alpha_pattern"),
        checked_number("lora_alpha", settings.get("lora_alpha")),
    )
    modules = {}
    for path, side in sides.items():
        if side.rank != ranks.of(path):
            raise _wrong_rank(side, ranks.of(path))
        divisor = math.sqrt(side.rank) if settings.get("use_rslora") else side.rank
        gate = alphas.of(path) / divisor
        if abs(gate) > MAX_ABSOLUTE_VALUE:
            raise AdapterRefusedError(
                f"the setting lora_alpha or alpha_pattern scales {path} by {gate:.3g}; at most "
                f"{MAX_ABSOLUTE_VALUE:.0f} is accepted"
            )
        modules[path] = ModuleRows(add_p_EI=side.in_RI, add_q_EO=side.out_RO, add_gate=gate)
    return modules


def _hira_modules(
    settings: Mapping[str, Any], sides: Mapping[str, _Sides]
) -> dict[str, ModuleRows]:
    ranks = _ranks(settings)
    default = settings["r"]
    for path, side in sides.items():
        # PEFT 0.21 writes rank_pattern but makes every HiRA module of rank r; the rank scales nothing.
        if side.rank not in (default, ranks.of(path)):
            raise _wrong_rank(side, ranks.of(path))
    return {
        path: ModuleRows(mul_b_RI=side.in_RI, mul_a_RO=side.out_RO) for path, side in sides.items()
    }


def _flora_modules(
    sides: Mapping[str, _Sides], metadata: Mapping[str, str]
) -> dict[str, ModuleRows]:
    return {
        path: flora.unpack(path, side.in_RI, side.out_RO, metadata) for path, side in sides.items()
    }


def _ranks(settings: Mapping[str, Any]) -> NumberPattern:
    return NumberPattern(
        "rank_pattern", settings.get("rank_pattern"), checked_number("r", settings.get("r"))
    )


def _wrong_rank(side: _Sides, expected: float) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"tensor {side.names[0]!r} has rank {side.rank}; expected {expected:g} as the settings r and rank_pattern say"
    )
