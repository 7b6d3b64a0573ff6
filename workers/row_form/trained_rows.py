"""Row mode in training: mul rows through W0 together with the base rows, and a backward written by hand.

    y = x W0ᵀ + Σ_j a_j ∘ z_j,     z_j = (b_j ∘ x) W0ᵀ
    dx = G W0 + Σ_j b_j ∘ h_j,     h_j = (a_j ∘ G) W0,     da_j = Σ_t G ∘ z_j,     db_j = Σ_t x ∘ h_j

Two products of as many rows; W0 is frozen and gets no gradient. Kept for the backward are x and z. Tokens of one
adapter never enter a sum with another's.

Source: FLoRA, arXiv 2312.05677, section 3.

Shape legend: T tokens, I input features, O output features, N bank pages, B tokens that need the base product, R mul
rows of the step, M = B + R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.row_form.base_linear import BaseLinear
from workers.row_form.module_index import ModuleIndex, RowIndex


class TrainedLoops(Protocol):
    """What stands around the two products. Pages that no row of the step names get gradients of zero."""

    def stack_inputs(self, x_TI: Tensor, in_rows_NI: Tensor, index: ModuleIndex) -> Tensor:
        """rows_MI in the type of x: the tokens that need the base product, then b_j ∘ x."""

    def sum_outputs(
        self, z_MO: Tensor, out_rows_NO: Tensor, index: ModuleIndex, *, is_last: bool
    ) -> Tensor:
        """y_TO. `is_last`: rounded to the type of z, and it may take the place of z's first rows."""

    def stack_gradients(
        self, gradient_TO: Tensor, z_RO: Tensor, out_rows_NO: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        """rows_MO in the type of the gradient: of the base tokens, then a_j ∘ G; and da_NO."""

    def finish_gradients(
        self, x_TI: Tensor, h_MI: Tensor, in_rows_NI: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        """dx_TI in the type of x, and db_NI. `h_MI` is used up."""


def trained_rows(
    x_TI: Tensor,
    base: BaseLinear,
    in_rows_NI: Tensor,
    out_rows_NO: Tensor,
    index: ModuleIndex,
    loops: TrainedLoops,
    *,
    is_last: bool,
) -> Tensor:
    """y_TO of a step with mul rows in row mode, differentiable in x and both rows; without the bias.

    Args:
        is_last: nothing will be added, so y is rounded to the type of `x_TI`; else float32 or wider.
    """
    return _apply(x_TI, in_rows_NI, out_rows_NO, base, index, loops, is_last)


class _TrainedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        base: BaseLinear,
        index: ModuleIndex,
        loops: TrainedLoops,
        is_last: bool,
    ) -> Tensor:
        z_MO = base.matmul(loops.stack_inputs(x_TI, in_rows_NI, index))
        z_RO = z_MO[index.num_base_tokens :]
        # y may lie before z in one tensor; the two are changed and kept apart.
        ctx.save_for_backward(x_TI, z_RO.data, in_rows_NI, out_rows_NO)
        ctx.base, ctx.index, ctx.loops = base, index, loops
        return loops.sum_outputs(z_MO, out_rows_NO, index, is_last=is_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, z_RO, in_rows_NI, out_rows_NO = ctx.saved_tensors
        rows_MO, da_NO = ctx.loops.stack_gradients(
            gradient_TO.to(x_TI.dtype), z_RO, out_rows_NO, ctx.index
        )
        h_MI = rows_MO @ ctx.base.dequantised_slice(slice(None), slice(None))
        dx_TI, db_NI = ctx.loops.finish_gradients(x_TI, h_MI, in_rows_NI, ctx.index)
        return dx_TI, db_NI, da_NO, None, None, None, None


_apply: Callable[..., Tensor] = _TrainedRows.apply


class TorchTrainedLoops:
    """In torch's own operations, on any device and type."""

    def stack_inputs(self, x_TI: Tensor, in_rows_NI: Tensor, index: ModuleIndex) -> Tensor:
        return _stacked(x_TI, in_rows_NI, mul_rows(index).in_page_R, index)

    def sum_outputs(
        self, z_MO: Tensor, out_rows_NO: Tensor, index: ModuleIndex, *, is_last: bool
    ) -> Tensor:
        y_TO = _summed(z_MO, out_rows_NO, mul_rows(index).out_page_R, index)
        return y_TO.to(z_MO.dtype) if is_last else y_TO

    def stack_gradients(
        self, gradient_TO: Tensor, z_RO: Tensor, out_rows_NO: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        mul = mul_rows(index)
        da_NO = _by_page(gradient_TO, z_RO, out_rows_NO, mul.out_page_R, mul.token_R)
        return _stacked(gradient_TO, out_rows_NO, mul.out_page_R, index), da_NO

    def finish_gradients(
        self, x_TI: Tensor, h_MI: Tensor, in_rows_NI: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        mul = mul_rows(index)
        db_NI = _by_page(
            x_TI, h_MI[index.num_base_tokens :], in_rows_NI, mul.in_page_R, mul.token_R
        )
        return _summed(h_MI, in_rows_NI, mul.in_page_R, index).to(x_TI.dtype), db_NI


def mul_rows(index: ModuleIndex) -> RowIndex:
    """Raises ValueError if there are none."""
    if index.mul is None:
        raise ValueError("the step has no mul rows in row mode here")
    return index.mul


def _stacked(x_TW: Tensor, rows_NW: Tensor, page_R: Tensor, index: ModuleIndex) -> Tensor:
    """Rows of the base tokens, then those of tokens scaled by their bank row."""
    some = index.base_token_B
    scaled_RW = x_TW.index_select(0, mul_rows(index).token_R) * rows_NW.index_select(0, page_R)
    return torch.cat(
        [x_TW if some is None else x_TW.index_select(0, some), scaled_RW.to(x_TW.dtype)]
    )


def _summed(z_MW: Tensor, rows_NW: Tensor, page_R: Tensor, index: ModuleIndex) -> Tensor:
    """`_stacked` the other way round, wide."""
    wide = torch.promote_types(z_MW.dtype, rows_NW.dtype)
    num_base = index.num_base_tokens
    if index.base_token_B is None:
        y_TW = z_MW[:num_base].to(wide, copy=True)
    else:
        y_TW = z_MW.new_zeros(index.num_tokens, z_MW.shape[1], dtype=wide)
        y_TW.index_copy_(0, index.base_token_B, z_MW[:num_base].to(wide))
    scaled_RW = z_MW[num_base:] * rows_NW.index_select(0, page_R)
    return y_TW.index_add_(0, mul_rows(index).token_R, scaled_RW)


def _by_page(
    left_TW: Tensor, right_RW: Tensor, like_NW: Tensor, page_R: Tensor, token_R: Tensor
) -> Tensor:
    product_RW = left_TW.index_select(0, token_R).to(like_NW.dtype) * right_RW
    return torch.zeros_like(like_NW).index_add_(0, page_R, product_RW)
