"""What LoRA's and HiRA's files have in common: two matrices per module, whose rank the settings name.

Shape legend: I input features, O output features, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.formats.module_tensors import ModuleTensors
from storage.formats.patterns import NumberPattern, checked_number


@dataclass(frozen=True, slots=True)
class Sides:
    """One module's two tensors, of matching rank, and their names in the file."""

    in_name: str
    out_name: str
    in_RI: Tensor
    out_RO: Tensor

    @property
    def rank(self) -> int:
        return self.in_RI.shape[0]


def read_sides(module: ModuleTensors, in_part: str, out_part: str) -> Sides:
    """Raises AdapterRefusedError for a missing tensor, or one whose shape is not [rank, in] or [out, rank]."""
    in_name, out_name = module.name(in_part), module.name(out_part)
    module.require(in_part)
    module.require(out_part)
    in_RI, out_OR = module.matrix(in_part), module.matrix(out_part)
    if in_RI.shape[0] != out_OR.shape[1]:
        raise AdapterRefusedError(
            f"tensor {out_name!r} has shape {list(out_OR.shape)}; expected {in_RI.shape[0]} columns, the rank of "
            f"{in_name!r}"
        )
    return Sides(in_name, out_name, in_RI, out_OR.T.contiguous())


def read_ranks(settings: Mapping[str, Any]) -> NumberPattern:
    """The rank of each module, as the settings `r` and `rank_pattern` say."""
    return NumberPattern(
        "rank_pattern", settings.get("rank_pattern"), checked_number("r", settings.get("r"))
    )


def wrong_rank(sides: Sides, expected: float) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"tensor {sides.in_name!r} has rank {sides.rank}; expected {expected:g} as the settings r and rank_pattern say"
    )
