"""Writes rows as PEFT adapter directories, which PEFT 0.21 loads and `read_peft` reads back exactly.

Equal rows give equal bytes, so publishing the same adapter again is the same version.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from statistics import mode
from typing import Any, TypeVar

from torch import Tensor

from storage.adapter_rows import AdapterRows
from storage.formats import flora, hira, ia3, lora
from storage.formats.module_tensors import PREFIX
from storage.formats.peft import SETTINGS_FILE, TENSORS_FILE
from storage.formats.tensors import write_tensors

_Number = TypeVar("_Number", int, float)


def write_flora(rows: AdapterRows, base_name: str) -> dict[str, bytes]:
    """FLoRA rows of either offset in HiRA's layout; see `formats.flora`.

    Args:
        rows: mul rows with both sides, one offset for all modules; modules without an effect are left out.
        base_name: what `base_model_name_or_path` says; a hub id or a plain name, not a path of this machine.

    Raises:
        ValueError: other rows, or none at all.
    """
    components, rank, metadata = flora.pack(rows)
    settings = {"peft_type": "HIRA", "r": rank, "rank_pattern": {}, "hira_dropout": 0.0}
    tensors = {
        path: {hira.IN_PART: in_RI, hira.OUT_PART: out_RO.T}
        for path, (in_RI, out_RO) in components.items()
    }
    return _directory(settings, tensors, base_name, _with_digest(metadata, rows))


def write_lora(rows: AdapterRows, base_name: str, *, use_rslora: bool = False) -> dict[str, bytes]:
    """Add rows as a LoRA, or with magnitudes as a DoRA; every module's gate becomes its alpha over its rank.

    Args:
        use_rslora: alpha over the root of the rank.

    Raises:
        ValueError: other rows, magnitudes in some modules only, or no rows at all.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for path, module in rows.modules.items():
        if set(module.tensors()) - {"add_q_EO", "add_p_EI", "magnitude_O"} or not module.offset:
            raise ValueError(f"{path} has other rows than LoRA's: {sorted(module.tensors())}")
        if module.add_p_EI is not None and module.add_q_EO is not None and module.num_add:
            tensors[path] = {lora.IN_PART: module.add_p_EI, lora.OUT_PART: module.add_q_EO.T}
            if module.magnitude_O is not None:
                tensors[path][lora.MAGNITUDE_PART] = module.magnitude_O
            divisor = math.sqrt(module.num_add) if use_rslora else module.num_add
            alphas[path] = _alpha(module.add_gate, divisor)
    if not tensors:
        raise ValueError("a LoRA adapter has rows in at least one module")
    num_magnitudes = sum(lora.MAGNITUDE_PART in parts for parts in tensors.values())
    if num_magnitudes not in (0, len(tensors)):
        raise ValueError("a DoRA adapter has a magnitude in every module")
    ranks = {path: parts[lora.IN_PART].shape[0] for path, parts in tensors.items()}
    rank, rank_pattern = _default_and_rest(ranks)
    alpha, alpha_pattern = _default_and_rest(alphas)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "use_dora": num_magnitudes > 0,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }
    return _directory(settings, tensors, base_name, _with_digest({}, rows))


def write_ia3(rows: AdapterRows, base_name: str) -> dict[str, bytes]:
    """Scales of outputs with their biases, and mul rows of inputs, as an IA3.

    Raises:
        ValueError: other rows, or none at all.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    feedforward = []
    for path, module in rows.modules.items():
        parts = set(module.tensors())
        if parts == {"mul_b_RI"} and module.num_mul == 1 and module.offset:
            assert module.mul_b_RI is not None
            tensors[path] = {ia3.PART: module.mul_b_RI + 1}
            feedforward.append(path)
        elif parts == {"scale_O", "bias_scale_O"} and module.scale_O is module.bias_scale_O:
            assert module.scale_O is not None
            tensors[path] = {ia3.PART: module.scale_O[:, None]}
        else:
            raise ValueError(f"{path} has other rows than IA3's: {sorted(parts)}")
    if not tensors:
        raise ValueError("an IA3 adapter has a vector in at least one module")
    settings = {
        "peft_type": "IA3",
        "feedforward_modules": sorted(feedforward),
        "init_ia3_weights": True,
    }
    return _directory(settings, tensors, base_name, _with_digest({}, rows))


def _directory(
    settings: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Tensor]],
    base_name: str,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """`modules`: each module's tensors by part."""
    tensors = {
        f"{PREFIX}{path}.{part}": tensor
        for path, parts in modules.items()
        for part, tensor in parts.items()
    }
    shared = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": sorted(modules),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    text = json.dumps(shared | dict(settings), indent=2, sort_keys=True, ensure_ascii=False)
    return {
        SETTINGS_FILE: (text + "\n").encode(),
        TENSORS_FILE: write_tensors(tensors, {"format": "pt", **metadata}),
    }


def _with_digest(metadata: dict[str, str], rows: AdapterRows) -> dict[str, str]:
    if rows.base_digest is None:
        return metadata
    return metadata | {flora.BASE_DIGEST: rows.base_digest}


def _alpha(gate: float, divisor: float) -> float:
    """The plainest alpha with `alpha / divisor == gate`; within a rounding of it if there is none."""
    alpha = gate * divisor
    for candidate in (
        round(alpha),
        round(alpha, 6),
        alpha,
        *(math.nextafter(alpha, to) for to in (0, math.inf)),
    ):
        if candidate / divisor == gate:
            return candidate
    return alpha


def _default_and_rest(of_path: Mapping[str, _Number]) -> tuple[_Number, dict[str, _Number]]:
    """The commonest value, and the others as a PEFT pattern whose keys match exactly one module each."""
    default = mode(sorted(of_path.values()))
    rest = {re.escape(path): value for path, value in of_path.items() if value != default}
    return default, rest
