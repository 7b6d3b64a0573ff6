"""What a family's reader is: one file beside this one, with a `READER` that `formats.peft` lists.

A reader turns settings and tensors into rows exactly, or refuses them by name. It needs no base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows


@dataclass(frozen=True, slots=True)
class ReadModule:
    """One module's rows, and by field of theirs the name of the tensor in the file, to tell a user which."""

    rows: ModuleRows
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter before it is understood: every tensor is finite and of a float type, every setting one that is known.

    `metadata` is the tensor file's own.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FamilyReader:
    """How adapters of one `peft_type` are read.

    `settings`: those that are read or have no effect here; others are refused unless they are switched off.
    `read`: the name of the family, and its modules by path. Raises AdapterRefusedError.
    """

    peft_type: str
    settings: frozenset[str]
    read: Callable[[AdapterFile], tuple[str, dict[str, ReadModule]]]


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as read. `tensor_names`: module path → field of its rows → tensor in the file."""

    rows: AdapterRows
    family: str  # flora, hira, lora, rslora, dora or ia3
    tensor_names: Mapping[str, Mapping[str, str]]
    dtype: str  # of the tensors in the file, comma-separated where they differ
