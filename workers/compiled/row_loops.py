"""The row form on CPU: one matrix product with W0, with one compiled loop before it and one behind it.

Same signature and results as `workers.row_form.adapted_product`, which it replaces while serving; no gradients.

Shape legend: T tokens, I input features, O output features, N bank pages, R mul rows in the step, B tokens that need
the base product, D tokens in weight mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.bank.module_bank import ModuleBank
from workers.compiled.library import CompiledLoops
from workers.row_form.adapted_product import weight_mode_rows
from workers.row_form.base_linear import BaseLinear
from workers.row_form.module_index import ModuleIndex


class RowLoops:
    """Works on contiguous rows of float32 or bfloat16 on CPU, which is what banks and models hold."""

    def __init__(self, loops: CompiledLoops, dtype: torch.dtype) -> None:
        self._stack = loops.function("stack_rows", dtype)
        self._combine = loops.function("combine_rows", dtype)

    def product(
        self,
        x_TI: Tensor,
        base: BaseLinear,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        index: ModuleIndex,
    ) -> Tensor:
        """The layer's output_TO, bias included, in the type of `x_TI`."""
        z = base.matmul(self._stacked(x_TI, in_rows_NI, index))
        deltas = [
            weight_mode_rows(x_TI, base, in_rows_NI, out_rows_NO, batch)
            for batch in index.mul_batches
        ]
        delta_DO = (deltas[0] if len(deltas) == 1 else torch.cat(deltas)) if deltas else None
        y_TO = x_TI.new_empty(x_TI.shape[0], base.out_features)
        self._combine_into(x_TI, z, base.bias_O, in_rows_NI, out_rows_NO, index, y_TO, delta_DO)
        return y_TO

    def finish(
        self, x_TI: Tensor, z_TO: Tensor, base: BaseLinear, rows: ModuleBank, index: ModuleIndex
    ) -> None:
        """Add to a base product, in place, what adapters without mul rows bring, and the bias."""
        self._combine_into(
            *(x_TI, z_TO, base.bias_O, rows.in_rows_NI, rows.out_rows_NO, index, z_TO, None)
        )

    def _combine_into(
        self,
        x_TI: Tensor,
        z: Tensor,
        bias_O: Tensor | None,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        index: ModuleIndex,
        y_TO: Tensor,
        delta_DO: Tensor | None,
    ) -> None:
        """Write what the rows of a product come to, rounded once.

        Args:
            z: first the base product of the tokens that need it, then the products of all mul rows. May be `y_TO`
                itself when there are no mul rows: every output is read before it is written.
        """
        if index.add_batches:
            raise ValueError("compiled loops take add rows token by token; see `cost_model_for`")
        mul, add = index.mul, index.add
        num_base = x_TI.shape[0] if index.base_token_B is None else index.base_token_B.shape[0]
        self._combine(
            *(x_TI.shape[0], x_TI.shape[1], y_TO.shape[1]),
            *(z.data_ptr(), z.stride(0), _address(index.base_row_T)),
            *((mul.first_T1.data_ptr(), num_base, mul.out_page_R.data_ptr()) if mul else _NO_MUL),
            *(_address(delta_DO), _address(index.delta_row_T), _address(index.scale_page_T)),
            *(x_TI.data_ptr(), x_TI.stride(0)),
            *(
                (
                    *(add.first_T1.data_ptr(), add.in_page_R.data_ptr()),
                    *(add.out_page_R.data_ptr(), add.gate_R.data_ptr()),
                )
                if add
                else _NO_ADD
            ),
            *(_address(bias_O), _address(index.bias_page_T)),
            *(in_rows_NI.data_ptr(), out_rows_NO.data_ptr(), y_TO.data_ptr(), y_TO.stride(0)),
        )

    def _stacked(self, x_TI: Tensor, in_rows_NI: Tensor, index: ModuleIndex) -> Tensor:
        """The rows that meet W0: the tokens themselves, then b_j ∘ x for every mul row."""
        mul, some = index.mul, index.base_token_B
        if mul is None and some is None:
            return x_TI
        num_base = x_TI.shape[0] if some is None else some.shape[0]
        num_mul = 0 if mul is None else mul.token_R.shape[0]
        rows = x_TI.new_empty(num_base + num_mul, x_TI.shape[1])
        self._stack(
            *(x_TI.data_ptr(), x_TI.stride(0), x_TI.shape[1], _address(some), num_base),
            *(in_rows_NI.data_ptr(), None if mul is None else mul.token_R.data_ptr()),
            *(None if mul is None else mul.in_page_R.data_ptr(), num_mul, rows.data_ptr()),
        )
        return rows


_NO_MUL = (None, 0, None)
_NO_ADD = (None, None, None, None)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
