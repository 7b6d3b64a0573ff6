"""All adapters' rows of one projection.

Shape legend: N bank pages, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from storage.adapter_rows import ModuleRows
from storage.errors import AdapterRefusedError
from storage.values import largest_value
from workers.bank.layout import SlotPages
from workers.bank.pages import ONES_PAGE


@dataclass(frozen=True, slots=True, eq=False)
class ModuleBank:
    """Written by loads, read by steps, never both in the same page at the same time."""

    in_rows_NI: Tensor
    out_rows_NO: Tensor
    bias_O: Tensor | None  # the base layer's own

    @classmethod
    def empty(
        cls,
        pages: int,
        shape: tuple[int, int],
        bias_O: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Pages of zeros, and the page of ones. `shape` is (in, out) features."""
        in_rows_NI = torch.zeros(pages, shape[0], dtype=dtype, device=device)
        out_rows_NO = torch.zeros(pages, shape[1], dtype=dtype, device=device)
        in_rows_NI[ONES_PAGE] = 1
        out_rows_NO[ONES_PAGE] = 1
        return cls(in_rows_NI, out_rows_NO, bias_O)

    def effective(self, rows: ModuleRows) -> ModuleRows:
        """The rows without the scale of a bias that is not there."""
        if rows.bias_scale_O is None or self.bias_O is not None:
            return rows
        return replace(rows, bias_scale_O=None)

    def check_shapes(self, path: str, rows: ModuleRows) -> None:
        """Raises AdapterRefusedError for a shape that is not the projection's."""
        sides = {"I": self.in_rows_NI.shape[1], "O": self.out_rows_NO.shape[1]}
        for name, tensor in rows.tensors().items():
            expected = sides[name[-1]]
            if tensor.shape[-1] != expected:
                raise AdapterRefusedError(
                    f"{path}: {name} has {tensor.shape[-1]} features, the model {expected}",
                    param=path,
                )

    def writes(
        self, rows: ModuleRows, pages: SlotPages
    ) -> Iterator[tuple[Tensor, tuple[int, ...], Tensor]]:
        """What it takes to bring one adapter's rows into its own pages: (bank rows, pages, their new values).

        The adapter's magnitude must have become a scale before.
        """
        scale_1O = None if rows.scale_O is None else rows.scale_O[None].double() - 1
        places = (
            (self.in_rows_NI, pages.mul_in, rows.mul_b_RI),
            (self.out_rows_NO, pages.mul_out, rows.mul_a_RO),
            (self.in_rows_NI, pages.add_in, rows.add_p_EI),
            (self.out_rows_NO, pages.add_out, rows.add_q_EO),
            (self.out_rows_NO, (pages.scale,), scale_1O),
            (self.out_rows_NO, (pages.bias,), self._bias_change(rows)),
        )
        for bank_rows, where, values in places:
            if values is not None and where:
                yield bank_rows, where, values

    def _bias_change(self, rows: ModuleRows) -> Tensor | None:
        """bias'_1O − bias_1O, or None where the base bias stays."""
        if rows.bias_O is rows.bias_scale_O is rows.bias_shift_O is None:
            return None
        bias_O = torch.zeros(self.out_rows_NO.shape[1]) if self.bias_O is None else self.bias_O
        bias_O = bias_O.cpu().double()
        if rows.bias_O is not None:
            return (rows.bias_O.cpu() - bias_O)[None]
        change_O = torch.zeros_like(bias_O)
        if rows.bias_scale_O is not None:
            change_O += bias_O * (rows.bias_scale_O.cpu().double() - 1)
        if rows.bias_shift_O is not None:
            change_O += rows.bias_shift_O.cpu()
        return change_O[None]


def check_finite(modules: Mapping[str, ModuleRows], dtype: torch.dtype) -> None:
    """Raises AdapterRefusedError, naming it, for a value that is not a finite number of that type."""
    if _are_finite(
        (tensor for rows in modules.values() for tensor in rows.tensors().values()), dtype
    ):
        return
    for path, rows in modules.items():
        for name, tensor in rows.tensors().items():
            if not _are_finite([tensor], dtype):
                raise AdapterRefusedError(
                    f"{path}: {name} has a value that is not finite", param=path
                )


def _are_finite(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    # The largest value tells: rounding keeps the order.
    largest = torch.tensor(largest_value(tensors), dtype=torch.float64)
    return math.isfinite(largest.to(dtype).item())
