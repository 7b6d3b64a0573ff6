"""The row form on CPU: one matrix product with W0, with one compiled loop before it and one behind it.

Same signature and results as `workers.row_form.adapted_product`, which it replaces while serving; no gradients.

Shape legend: T tokens, I input features, O output features, N bank pages, R mul rows in the step, B tokens that need
the base product, D tokens in weight mode.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.bank.module_bank import ModuleBank
from workers.compiled.library import CompiledLoops
from workers.row_form.adapted_product import weight_mode_rows
from workers.row_form.base_linear import BaseLinear
from workers.row_form.module_index import ModuleIndex


class _LayerStep(ctypes.Structure):
    """`LayerStep` of rows.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "outputs", "base_tokens")),
        *((name, ctypes.c_void_p) for name in ("base_token", "base_row")),
        ("mul_rows", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("mul_first", "mul_token", "mul_in_page", "mul_out_page"),
                *("delta_row", "scale_page", "bias_page"),
                *("add_first", "add_in_page", "add_out_page", "add_gate"),
                *("bias", "in_rows", "out_rows"),
            )
        ),
    )


class RowLoops:
    """Works on contiguous rows of float32 or bfloat16 on CPU, which is what banks and models hold."""

    def __init__(self, loops: CompiledLoops, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stack = loops.function("stack_rows", dtype)
        self._combine = loops.function("combine_rows", dtype)
        # By the address of a layer's rows. An index lives as long as its entry, so addresses in it stay good.
        self._steps: dict[int, tuple[ModuleIndex, _LayerStep, int]] = {}

    def product(
        self,
        x_TI: Tensor,
        base: BaseLinear,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        index: ModuleIndex,
    ) -> Tensor:
        """The layer's output_TO, bias included, in the type of `x_TI`."""
        if x_TI.dtype != self._dtype or x_TI.stride(1) != 1:
            raise TypeError(f"{self._dtype} in contiguous rows is compiled, not {x_TI.dtype}")
        step, address = self._step(base, in_rows_NI, out_rows_NO, index)
        x, x_stride = x_TI.data_ptr(), x_TI.stride(0)
        rows = x_TI
        if step.mul_rows or index.base_token_B is not None:
            rows = x_TI.new_empty(step.base_tokens + step.mul_rows, step.inputs)
            self._stack(address, x, x_stride, rows.data_ptr())
        z = base.matmul(rows)
        deltas = [
            weight_mode_rows(x_TI, base, in_rows_NI, out_rows_NO, batch)
            for batch in index.mul_batches
        ]
        delta_DO = torch.cat(deltas) if deltas else None
        delta = None if delta_DO is None else delta_DO.data_ptr()
        y_TO = x_TI.new_empty(step.tokens, step.outputs)
        self._combine(
            *(address, x, x_stride, z.data_ptr(), z.stride(0), delta),
            *(y_TO.data_ptr(), step.outputs),
        )
        return y_TO

    def finish(
        self, x_TI: Tensor, z_TO: Tensor, base: BaseLinear, rows: ModuleBank, index: ModuleIndex
    ) -> None:
        """Add to a base product, in place, what adapters without mul rows bring, and the bias."""
        if index.has_mul_rows:
            raise ValueError("mul rows are products of their own; nothing can be added for them")
        _, address = self._step(base, rows.in_rows_NI, rows.out_rows_NO, index)
        place, stride = z_TO.data_ptr(), z_TO.stride(0)
        # Every output is read before it is written.
        self._combine(address, x_TI.data_ptr(), x_TI.stride(0), place, stride, None, place, stride)

    def _step(
        self, base: BaseLinear, in_rows_NI: Tensor, out_rows_NO: Tensor, index: ModuleIndex
    ) -> tuple[_LayerStep, int]:
        """The layer's part of the step, written once for as long as the same sequences decode."""
        key = in_rows_NI.data_ptr()
        known = self._steps.get(key)
        if known is not None and known[0] is index:
            return known[1], known[2]
        if index.add_batches:
            raise ValueError(
                "compiled loops take add rows token by token; see `CostModel.thin_product_tokens`"
            )
        mul, add = index.mul, index.add
        num_base = index.num_tokens if index.base_token_B is None else index.base_token_B.shape[0]
        step = _LayerStep(
            *(index.num_tokens, in_rows_NI.shape[1], out_rows_NO.shape[1], num_base),
            *(_address(index.base_token_B), _address(index.base_row_T)),
            *((mul.token_R.shape[0], _address(mul.first_T1)) if mul else (0, None)),
            *((_address(mul.token_R), _address(mul.in_page_R)) if mul else (None, None)),
            _address(mul.out_page_R) if mul else None,
            *(_address(index.delta_row_T), _address(index.scale_page_T)),
            _address(index.bias_page_T),
            *((_address(add.first_T1), _address(add.in_page_R)) if add else (None, None)),
            *((_address(add.out_page_R), _address(add.gate_R)) if add else (None, None)),
            *(_address(base.bias_O), key, out_rows_NO.data_ptr()),
        )
        self._steps[key] = (index, step, ctypes.addressof(step))
        return step, ctypes.addressof(step)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
