"""Settings of a PEFT adapter_config.json: parsed, and all that are not known refused.

Checked against PEFT 0.21. A setting that is absent, or has a value that switches it off, is fine; anything else that
a family's reader does not list changes what the adapter computes, or could.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from storage.errors import AdapterRefusedError

_OFF: tuple[object, ...] = (None, False, "none", "", [], {})

COMMON_SETTINGS = frozenset(
    {
        *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("task_type", "inference_mode", "target_modules", "exclude_modules"),
        # How the *base* stores its weight; an adapter's tensors have the same orientation either way.
        "fan_in_fan_out",
    }
)
"""Of every family: how the adapter was made, or which modules it targets."""


def parse_settings(file: bytes) -> dict[str, Any]:
    """Raises AdapterRefusedError unless it is a JSON object."""
    try:
        settings = json.loads(file)
    except (ValueError, RecursionError):
        raise AdapterRefusedError("adapter_config.json is not JSON") from None
    if not isinstance(settings, dict):
        raise AdapterRefusedError("adapter_config.json is not a JSON object")
    return settings


def check_known(family: str, settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises AdapterRefusedError naming a setting that is not known and not switched off."""
    for setting, value in settings.items():
        if setting not in known and value not in _OFF:
            raise AdapterRefusedError(
                f"the setting {setting}={shown(value)} is not supported for {family} adapters"
            )


def read_switch(settings: Mapping[str, Any], setting: str) -> bool:
    """Raises AdapterRefusedError for a value that is neither on nor off."""
    value = settings.get(setting)
    if value is not True and value not in _OFF:
        raise AdapterRefusedError(f"the setting {setting} is neither true nor false")
    return value is True


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
