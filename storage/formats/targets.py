"""Which modules the settings of an adapter name. PEFT would ignore the tensors of any other.

Lists of names are compared as PEFT 0.21 does (`peft.tuners.tuners_utils.check_target_module_exists`). An expression is
not run: it comes from a stranger, and PEFT itself made the tensors from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from storage.errors import AdapterRefusedError

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_PLAIN_NAME = re.compile(r"\w+")


def names(modules: object, path: str) -> bool:
    """Whether a list of module names has this one: its whole path, or the end of it from a dot on."""
    # The whole path first: lists that name every module so would else take a while, module by module.
    return isinstance(modules, list) and (
        path in modules or any(path.endswith(f".{module}") for module in modules)
    )


def check_target(settings: Mapping[str, Any], path: str, tensor_name: str) -> None:
    """Raises AdapterRefusedError, naming tensor and setting, for a module that the settings do not target."""
    targets = settings.get("target_modules")
    if isinstance(targets, list):
        if not names(targets, path):
            raise _stray(tensor_name, "not in target_modules")
        if path not in targets and not _is_layer_targeted(settings, path):
            raise _stray(tensor_name, "in a layer that is not in layers_to_transform")
    if names(settings.get("exclude_modules"), path):
        raise _stray(tensor_name, "in exclude_modules")


def _is_layer_targeted(settings: Mapping[str, Any], path: str) -> bool:
    layers = settings.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if not layers:
        return True
    if not isinstance(layers, list):
        raise AdapterRefusedError("the setting layers_to_transform is neither a number nor a list")
    patterns = settings.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    if not all(isinstance(one, str) and _PLAIN_NAME.fullmatch(one) for one in patterns):
        return True
    expressions = [re.compile(rf"(?:^|.*?\.){one}\.(\d+)\.") for one in patterns]
    found = (one.match(path) for one in expressions or [_FIRST_NUMBER])
    number = next((match.group(1) for match in found if match), None)
    return number is not None and int(number) in layers


def _stray(tensor_name: str, where: str) -> AdapterRefusedError:
    return AdapterRefusedError(f"tensor {tensor_name!r} is for a module {where}")
