"""FLoRA inside PEFT's HiRA layout, such that PEFT computes the same function and we get the same rows back.

HiRA is offset 1. An offset-0 module is exported with one more component, a = −1 and b = 1, which takes the base
product away again. PEFT 0.21 gives every HiRA module the rank `r`, whatever `rank_pattern` says, so modules of lower
rank are filled up with zero rows. What was added is named in the file's metadata, checked and taken out on reading.

Shape legend: I input features, O output features, R rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError

OFFSET = "flora.offset"  # "0" or "1"
RANKS = "flora.ranks"  # JSON: true rank by module path
BASE_DIGEST = "flora.base_digest"


def pack(rows: AdapterRows) -> tuple[dict[str, tuple[Tensor, Tensor]], int, dict[str, str]]:
    """HiRA components of one common rank, with what `unpack` needs to undo it.

    Returns:
        (b_RI, a_RO) by module path; the rank; the metadata.

    Raises:
        ValueError: the rows are not FLoRA rows: other than mul rows with both sides, mixed offsets, or no rows at all.
    """
    touched = {
        path: module for path, module in rows.modules.items() if module.num_mul or not module.offset
    }
    offsets = {module.offset for module in touched.values()}
    if len(offsets) != 1:
        raise ValueError(f"a FLoRA adapter has rows and one offset for all modules, not {offsets}")
    for path, module in touched.items():
        if set(module.tensors()) != {"mul_a_RO", "mul_b_RI"}:
            raise ValueError(f"{path} has other rows than FLoRA's: {sorted(module.tensors())}")
    (offset,) = offsets
    rank = max(module.num_mul for module in touched.values()) + (1 - offset)
    components = {path: _filled(module, rank) for path, module in touched.items()}
    metadata = {
        OFFSET: str(offset),
        RANKS: json.dumps({path: module.num_mul for path, module in sorted(touched.items())}),
    }
    return components, rank, metadata


def unpack(path: str, b_RI: Tensor, a_RO: Tensor, metadata: Mapping[str, str]) -> ModuleRows:
    """One module's FLoRA rows from its HiRA components.

    Raises:
        AdapterRefusedError: the metadata or the components are not what `pack` makes.
    """
    offset, rank = _described(path, metadata)
    num_added = b_RI.shape[0] - rank
    if num_added < 1 - offset or not _is_as_packed(b_RI[rank:], a_RO[rank:], offset):
        raise AdapterRefusedError(
            f"the module {path} does not have the {rank} FLoRA rows with offset {offset} that the file's metadata "
            "describes"
        )
    if num_added:
        b_RI, a_RO = b_RI[:rank].clone(), a_RO[:rank].clone()
    return ModuleRows(mul_a_RO=a_RO, mul_b_RI=b_RI, offset=offset)


def _is_as_packed(added_b: Tensor, added_a: Tensor, offset: int) -> bool:
    if not len(added_b):
        return True
    expected_b, expected_a = torch.zeros_like(added_b), torch.zeros_like(added_a)
    if offset == 0:
        expected_b[0], expected_a[0] = 1, -1
    return torch.equal(added_b, expected_b) and torch.equal(added_a, expected_a)


def _filled(module: ModuleRows, rank: int) -> tuple[Tensor, Tensor]:
    a_RO, b_RI = module.mul_a_RO, module.mul_b_RI
    assert a_RO is not None and b_RI is not None  # checked by `pack`
    filled_b_RI = b_RI.new_zeros(rank, b_RI.shape[1])
    filled_a_RO = a_RO.new_zeros(rank, a_RO.shape[1])
    filled_b_RI[: module.num_mul] = b_RI
    filled_a_RO[: module.num_mul] = a_RO
    if module.offset == 0:
        filled_b_RI[module.num_mul] = 1
        filled_a_RO[module.num_mul] = -1
    return filled_b_RI, filled_a_RO


@lru_cache(maxsize=8)
def _ranks(text: str) -> Any:
    """The same text is asked of for every module. What it returns is not to be changed."""
    return json.loads(text)


def _described(path: str, metadata: Mapping[str, str]) -> tuple[int, int]:
    try:
        offset = {"0": 0, "1": 1}[metadata[OFFSET]]
        rank = _ranks(metadata[RANKS])[path]
    except (KeyError, ValueError, TypeError, RecursionError):
        rank = None
    if type(rank) is not int or rank < 0:
        raise AdapterRefusedError(
            f"the file's metadata {OFFSET} and {RANKS} do not describe the module {path}"
        )
    return offset, rank
