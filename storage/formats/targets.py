"""Which modules the settings of an adapter name. PEFT would ignore the tensors of any other.

Lists of names are compared as PEFT 0.21 does (`peft.tuners.tuners_utils.check_target_module_exists`). An expression is
not run: it comes from a stranger, and PEFT itself made the tensors from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from storage.errors import AdapterRefusedError

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_PLAIN_NAME = re.compile(r"\w+")


class Targets:
    """The modules that an adapter's settings name."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._targets = _Names.of(settings.get("target_modules"))
        self._excluded = _Names.of(settings.get("exclude_modules"))

    def check(self, path: str, tensor_name: str) -> None:
        """Raises AdapterRefusedError, naming tensor and setting, for a module that is not targeted."""
        if self._targets is not None and path not in self._targets.whole:
            if not self._targets.has(path):
                raise _stray(tensor_name, "not in target_modules")
            if not _is_layer_targeted(self._settings, path):
                raise _stray(tensor_name, "in a layer that is not in layers_to_transform")
        if self._excluded is not None and self._excluded.has(path):
            raise _stray(tensor_name, "in exclude_modules")


@dataclass(frozen=True, slots=True)
class _Names:
    """A list of module names: each names a module by its whole path, or by the end of it from a dot on."""

    whole: frozenset[str]
    ends: tuple[str, ...]

    @classmethod
    def of(cls, modules: object) -> Self | None:
        """None for what is not a list."""
        if not isinstance(modules, list):
            return None
        names = [str(module) for module in modules]
        return cls(frozenset(names), tuple(f".{name}" for name in names))

    def has(self, path: str) -> bool:
        return path in self.whole or path.endswith(self.ends)


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
