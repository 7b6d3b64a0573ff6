"""The tensors of an adapter's file by module, none left over.

Names are as PEFT writes them: `base_model.model.<module path>.<part>`, such as `….q_proj.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from storage.errors import AdapterRefusedError

PREFIX = "base_model.model."

_KNOWN_STRANGERS = {
    "_embedding_": "adapters on embeddings are not supported",
    "token_adapter": "trained tokens (trainable_token_indices) are not supported",
    "modules_to_save": "whole modules (modules_to_save) are not supported",
    "base_layer.weight": "adapters on embeddings or the output head, and their weights, are not supported",
}


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """One module's tensors, by part."""

    path: str
    parts: Mapping[str, Tensor]

    def name(self, part: str) -> str:
        """The tensor's name in the file."""
        return f"{PREFIX}{self.path}.{part}"

    def require(self, part: str) -> Tensor:
        """Raises AdapterRefusedError, naming it, where it is missing."""
        if part not in self.parts:
            present = self.name(min(self.parts))
            raise AdapterRefusedError(
                f"tensor {self.name(part)!r} is missing; {present!r} is there"
            )
        return self.parts[part]

    def vector(self, part: str) -> Tensor:
        """A tensor of one dimension, not empty."""
        tensor = self.require(part)
        if tensor.ndim != 1 or not len(tensor):
            raise AdapterRefusedError(
                f"tensor {self.name(part)!r} has shape {list(tensor.shape)}; expected one dimension, not empty"
            )
        return tensor

    def matrix(self, part: str) -> Tensor:
        """A tensor of two dimensions, neither empty."""
        tensor = self.require(part)
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterRefusedError(
                f"tensor {self.name(part)!r} has shape {list(tensor.shape)}; expected two dimensions, neither empty"
            )
        return tensor


def by_module(
    family: str, tensors: Mapping[str, Tensor], parts: Sequence[str]
) -> dict[str, ModuleTensors]:
    """Every tensor, sorted by its module's path.

    Args:
        family: what a refusal calls it.
        parts: all that a module may have; where one ends another, the longer counts.

    Raises:
        AdapterRefusedError: a tensor is none of them, or there are no tensors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    longest_first = sorted(((f".{part}", part) for part in parts), key=lambda ends: -len(ends[0]))
    for name in sorted(tensors):
        part = next((part for end, part in longest_first if name.endswith(end)), None)
        path = "" if part is None else name[len(PREFIX) : -len(part) - 1]
        if part is None or not path or not name.startswith(PREFIX):
            raise AdapterRefusedError(f"unexpected tensor {name!r}: {_why(family, name, parts)}")
        found.setdefault(path, {})[part] = tensors[name]
    if not found:
        raise AdapterRefusedError(f"the {family} adapter holds no tensors")
    return {path: ModuleTensors(path, found[path]) for path in sorted(found)}


def _why(family: str, name: str, parts: Sequence[str]) -> str:
    for sign, reason in _KNOWN_STRANGERS.items():
        if sign in name:
            return reason
    expected = ", ".join(f".{part}" for part in parts)
    return f"of {family} adapters, {PREFIX}<module> with one of {expected} is read"
