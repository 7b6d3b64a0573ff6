"""Row mode's loops of training, compiled: the same numbers as `TorchTrainedLoops`, each tensor read once.

Shape legend: as in `workers.row_form.trained_rows`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.compiled.library import CompiledLoops
from workers.row_form.module_index import ModuleIndex
from workers.row_form.trained_rows import mul_rows


class _TrainedStep(ctypes.Structure):
    """`TrainedStep` of trained_rows.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "outputs", "base_tokens")),
        *((name, ctypes.c_void_p) for name in ("base_token", "base_row")),
        ("mul_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("first", "token", "in_page", "out_page")),
        *((name, ctypes.c_void_p) for name in ("in_rows", "out_rows")),
    )


class CompiledTrainedLoops:
    """Of a base in float32 or bfloat16 on CPU, with rows in float32."""

    def __init__(self, loops: CompiledLoops, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stack_inputs = loops.function("stack_inputs", dtype)
        self._sum_outputs = loops.function("sum_outputs", dtype)
        self._sum_outputs_wide = loops.function("sum_outputs_wide", dtype)
        self._stack_gradients = loops.function("stack_gradients", dtype)
        self._finish_gradients = loops.function("finish_gradients", dtype)

    def stack_inputs(self, x_TI: Tensor, in_rows_NI: Tensor, index: ModuleIndex) -> Tensor:
        x_TI = self._checked(x_TI)
        step = _step(index, in_rows=in_rows_NI)
        rows_MI = x_TI.new_empty(step.base_tokens + step.mul_rows, step.inputs)
        self._stack_inputs(ctypes.addressof(step), x_TI.data_ptr(), rows_MI.data_ptr())
        return rows_MI

    def sum_outputs(
        self, z_MO: Tensor, out_rows_NO: Tensor, index: ModuleIndex, *, is_last: bool
    ) -> Tensor:
        z_MO = self._checked(z_MO)
        step = _step(index, out_rows=out_rows_NO)
        if not is_last:
            y_TO = z_MO.new_empty(step.tokens, step.outputs, dtype=torch.float32)
            self._sum_outputs_wide(ctypes.addressof(step), z_MO.data_ptr(), y_TO.data_ptr())
            return y_TO
        # A token's base row is its own place, read before it is written.
        in_place = index.base_token_B is None
        y_TO = z_MO[: step.tokens] if in_place else z_MO.new_empty(step.tokens, step.outputs)
        self._sum_outputs(ctypes.addressof(step), z_MO.data_ptr(), y_TO.data_ptr())
        return y_TO

    def stack_gradients(
        self, gradient_TO: Tensor, z_RO: Tensor, out_rows_NO: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        gradient_TO, z_RO = self._checked(gradient_TO), self._checked(z_RO)
        step = _step(index, out_rows=out_rows_NO)
        rows_MO = gradient_TO.new_empty(step.base_tokens + step.mul_rows, step.outputs)
        da_NO = torch.zeros_like(out_rows_NO)
        self._stack_gradients(
            *(ctypes.addressof(step), gradient_TO.data_ptr(), z_RO.data_ptr()),
            *(rows_MO.data_ptr(), da_NO.data_ptr()),
        )
        return rows_MO, da_NO

    def finish_gradients(
        self, x_TI: Tensor, h_MI: Tensor, in_rows_NI: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        x_TI, h_MI = self._checked(x_TI), self._checked(h_MI)
        step = _step(index, in_rows=in_rows_NI)
        in_place = index.base_token_B is None
        dx_TI = h_MI[: step.tokens] if in_place else x_TI.new_empty(step.tokens, step.inputs)
        db_NI = torch.zeros_like(in_rows_NI)
        self._finish_gradients(
            *(ctypes.addressof(step), x_TI.data_ptr(), h_MI.data_ptr()),
            *(dx_TI.data_ptr(), db_NI.data_ptr()),
        )
        return dx_TI, db_NI

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.dtype != self._dtype:
            raise TypeError(f"{self._dtype} is compiled, not {rows.dtype}")
        return rows.contiguous()


def _step(
    index: ModuleIndex, *, in_rows: Tensor | None = None, out_rows: Tensor | None = None
) -> _TrainedStep:
    """A step for the side whose rows are given."""
    for rows in (in_rows, out_rows):
        if rows is not None and (rows.dtype != torch.float32 or not rows.is_contiguous()):
            raise TypeError("trained rows are contiguous float32")
    mul = mul_rows(index)
    return _TrainedStep(
        index.num_tokens,
        0 if in_rows is None else in_rows.shape[1],
        0 if out_rows is None else out_rows.shape[1],
        index.num_base_tokens,
        *(_address(index.base_token_B), _address(index.base_row_T)),
        mul.token_R.shape[0],
        *(_address(mul.first_T1), _address(mul.token_R)),
        *(_address(mul.in_page_R), _address(mul.out_page_R)),
        *(_address(in_rows), _address(out_rows)),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
