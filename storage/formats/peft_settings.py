"""Which settings of a PEFT adapter_config.json we read, which mean nothing here, and that all others are refused.

Checked against PEFT 0.21 (`LoraConfig`, `HiraConfig`). A setting that is absent, or has the value that switches it
off, is fine; anything else that is not listed changes what the adapter computes, or could.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from storage.errors import AdapterRefusedError

_OFF: tuple[object, ...] = (None, False, "none", "", [], {})

# How the adapter was made, or what the tensors themselves say. `fan_in_fan_out` only says how the *base* stores its
# weight; A and B have the same orientation either way.
_NO_EFFECT = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "fan_in_fan_out"),
}
_READ_OR_NO_EFFECT = {
    "LORA": {
        *_NO_EFFECT,
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("init_lora_weights", "lora_dropout", "eva_config", "corda_config", "lora_ga_config"),
        *("loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
    },
    "HIRA": {*_NO_EFFECT, "r", "rank_pattern", "init_weights", "hira_dropout"},
}
# The other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training, and the
# adapter is then relative to those.
_BEGINNINGS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


def read_settings(file: bytes) -> dict[str, Any]:
    """The settings of an adapter_config.json of a family we read.

    Raises:
        AdapterRefusedError: not JSON, another family, or a setting that we do not support; names it.
    """
    try:
        settings = json.loads(file)
    except (ValueError, RecursionError):
        raise AdapterRefusedError("adapter_config.json is not JSON") from None
    if not isinstance(settings, dict):
        raise AdapterRefusedError("adapter_config.json is not a JSON object")
    family = settings.get("peft_type")
    known = _READ_OR_NO_EFFECT.get(family) if isinstance(family, str) else None
    if known is None:
        raise AdapterRefusedError(
            f"adapter_config.json has peft_type {family!r}; supported are "
            f"{', '.join(sorted(_READ_OR_NO_EFFECT))}"
        )
    for setting, value in settings.items():
        if setting not in known and value not in _OFF:
            raise AdapterRefusedError(
                f"the setting {setting}={_shown(value)} is not supported for {family} adapters"
            )
    if settings.get("use_rslora") not in (None, True, False):
        raise AdapterRefusedError("the setting use_rslora is neither true nor false")
    beginning = settings.get("init_lora_weights")
    if beginning not in _BEGINNINGS:
        raise AdapterRefusedError(
            f"the setting init_lora_weights={_shown(beginning)} trains against changed base weights; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion to make it an ordinary LoRA"
        )
    return settings


def check_targets(settings: Mapping[str, Any], path: str, tensor_name: str) -> None:
    """Refuse a module that the settings do not target: PEFT would ignore its tensors.

    Only lists of names are compared. An expression is not run: it comes from a stranger, and PEFT itself made the
    tensors from it.
    """
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if isinstance(targets, list) and not _names(targets, path):
        raise AdapterRefusedError(f"tensor {tensor_name!r} is for a module not in target_modules")
    if isinstance(excluded, list) and _names(excluded, path):
        raise AdapterRefusedError(f"tensor {tensor_name!r} is for a module in exclude_modules")


def _names(modules: list[object], path: str) -> bool:
    return any(path == module or path.endswith(f".{module}") for module in modules)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
