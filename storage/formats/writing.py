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
from storage.formats import flora, hira, lora
from storage.formats.module_tensors import PREFIX
from storage.formats.peft import SETTINGS_FILE, TENSORS_FILE
from storage.formats.tensors import write_tensors

_Number = TypeVar("_Number", int, float)
_PARTS = {"HIRA": (hira.IN_PART, hira.OUT_PART), "LORA": (lora.IN_PART, lora.OUT_PART)}


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
    return _directory(settings, components, base_name, _with_digest(metadata, rows))


def write_lora(rows: AdapterRows, base_name: str, *, use_rslora: bool = False) -> dict[str, bytes]:
    """Add rows as an ordinary LoRA; every module's gate becomes its alpha over its rank.

    Args:
        use_rslora: as rsLoRA: alpha over the root of the rank.

    Raises:
        ValueError: other rows, or none at all.
    """
    components: dict[str, tuple[Tensor, Tensor]] = {}
    alphas: dict[str, float] = {}
    for path, module in rows.modules.items():
        if set(module.tensors()) - {"add_q_EO", "add_p_EI"} or not module.offset:
            raise ValueError(f"{path} has other rows than LoRA's: {sorted(module.tensors())}")
        if module.add_p_EI is not None and module.add_q_EO is not None and module.num_add:
            components[path] = (module.add_p_EI, module.add_q_EO)
            divisor = math.sqrt(module.num_add) if use_rslora else module.num_add
            alphas[path] = _alpha(module.add_gate, divisor)
    if not components:
        raise ValueError("a LoRA adapter has rows in at least one module")
    ranks = {path: in_RI.shape[0] for path, (in_RI, _) in components.items()}
    rank, rank_pattern = _default_and_rest(ranks)
    alpha, alpha_pattern = _default_and_rest(alphas)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }
    return _directory(settings, components, base_name, _with_digest({}, rows))


def _directory(
    settings: Mapping[str, Any],
    components: Mapping[str, tuple[Tensor, Tensor]],
    base_name: str,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    in_part, out_part = _PARTS[settings["peft_type"]]
    tensors = {}
    for path, (in_RI, out_RO) in components.items():
        tensors[f"{PREFIX}{path}.{in_part}"] = in_RI
        tensors[f"{PREFIX}{path}.{out_part}"] = out_RO.T
    shared = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": sorted(components),
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
