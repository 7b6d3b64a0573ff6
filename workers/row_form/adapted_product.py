"""One adapted linear layer over a step of mixed tokens: the universal row form.

    y = c ∘ [ offset · x W0ᵀ + Σ_mul a_j ∘ ((b_j ∘ x) W0ᵀ) ] + Σ_add g_e · (x · p_e) q_e + bias'

Plain differentiable torch: serving and training run the same code, training with a backward of its own for products
(`TrainedProduct`). Tokens of one adapter never enter a sum with another's: rows are selected, never multiplied by a
mask, because 0 × inf is NaN.

Source: FLoRA, arXiv 2312.05677, section 3; weight mode goes beyond it.

Shape legend: T tokens, I input features, O output features, N bank pages, R rows in the step, B tokens that need the
base product, A runs of a batch with L tokens and K bank rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.row_form.base_linear import BaseLinear
from workers.row_form.module_index import ModuleIndex, RowIndex, RunBatch
from workers.row_form.trained_rows import TrainedLoops, trained_rows
from workers.row_form.weight_product import weight_product


def adapted_product(
    x_TI: Tensor, base: BaseLinear, in_rows_NI: Tensor, out_rows_NO: Tensor, index: ModuleIndex
) -> Tensor:
    """The layer's output_TO, bias included, as the float32 (or wider) sum that the caller rounds once."""
    y_TO = _products(x_TI, base, in_rows_NI, out_rows_NO, index)
    return _with_the_rest(y_TO, x_TI, base, in_rows_NI, out_rows_NO, index)


class TrainedProduct:
    """`adapted_product` with the backward of `trained_rows` where mul rows are in row mode."""

    def __init__(self, loops: TrainedLoops) -> None:
        self._loops = loops

    def __call__(
        self,
        x_TI: Tensor,
        base: BaseLinear,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        index: ModuleIndex,
    ) -> Tensor:
        """As `adapted_product`, but rounded already to the type of `x_TI` where mul rows are all there is."""
        if index.mul is None:
            return adapted_product(x_TI, base, in_rows_NI, out_rows_NO, index)
        is_last = index.has_rows_only and base.bias_O is None
        y_TO = trained_rows(
            x_TI, base, in_rows_NI, out_rows_NO, index, self._loops, is_last=is_last
        )
        if is_last:
            return y_TO
        return _with_the_rest(y_TO, x_TI, base, in_rows_NI, out_rows_NO, index)


def _with_the_rest(
    y_TO: Tensor,
    x_TI: Tensor,
    base: BaseLinear,
    in_rows_NI: Tensor,
    out_rows_NO: Tensor,
    index: ModuleIndex,
) -> Tensor:
    """Everything that is added to base rows and row-mode mul rows, or scales them; changes `y_TO`."""
    for batch in index.mul_batches:
        delta = weight_mode_rows(x_TI, base, in_rows_NI, out_rows_NO, batch)
        y_TO.index_add_(0, batch.token_AL.flatten(), delta.to(y_TO.dtype))
    if index.scale_page_T is not None:
        y_TO = torch.addcmul(y_TO, y_TO, out_rows_NO.index_select(0, index.scale_page_T))
    if index.add is not None:
        y_TO.index_add_(
            0, index.add.token_R, _gathered_add_rows(x_TI, in_rows_NI, out_rows_NO, index.add, y_TO)
        )
    for batch in index.add_batches:
        delta_ALO = _thin_products(x_TI, in_rows_NI, out_rows_NO, batch)
        y_TO.index_add_(0, batch.token_AL.flatten(), delta_ALO.flatten(0, 1).to(y_TO.dtype))
    if base.bias_O is not None:
        y_TO = y_TO + base.bias_O
    if index.bias_page_T is not None:
        y_TO = y_TO + out_rows_NO.index_select(0, index.bias_page_T)
    return y_TO


def _products(
    x_TI: Tensor, base: BaseLinear, in_rows_NI: Tensor, out_rows_NO: Tensor, index: ModuleIndex
) -> Tensor:
    """Base rows and row-mode mul rows through W0 in one product, so W0 is read once."""
    accumulator = torch.promote_types(x_TI.dtype, torch.float32)
    some = index.base_token_B
    stacked = [x_TI if some is None else x_TI.index_select(0, some)]
    num_base = stacked[0].shape[0]
    if index.mul is not None:
        b_RI = in_rows_NI.index_select(0, index.mul.in_page_R)
        stacked.append((x_TI.index_select(0, index.mul.token_R) * b_RI).to(x_TI.dtype))
    z = base.matmul(torch.cat(stacked) if len(stacked) > 1 else stacked[0]).to(accumulator)
    if some is None:
        y_TO = z[:num_base] if index.mul is not None else z
    else:
        y_TO = z.new_zeros(x_TI.shape[0], base.out_features)
        y_TO.index_copy_(0, some, z[:num_base])
    if index.mul is not None:
        a_RO = out_rows_NO.index_select(0, index.mul.out_page_R)
        y_TO = y_TO.index_add(0, index.mul.token_R, (z[num_base:] * a_RO).to(accumulator))
    return y_TO


def weight_mode_rows(
    x_TI: Tensor, base: BaseLinear, in_rows_NI: Tensor, out_rows_NO: Tensor, batch: RunBatch
) -> Tensor:
    """What a batch of runs adds to its tokens through a weight of its own: [A·L, O], in the type of `x_TI`."""
    x_ALI = _gathered(x_TI, batch.token_AL)
    a_AKO = _gathered(out_rows_NO, batch.out_page_AK)
    b_AKI = _gathered(in_rows_NI, batch.in_page_AK)
    return weight_product(x_ALI, base, a_AKO, b_AKI, batch.shift_A).flatten(0, 1)


def _gathered_add_rows(
    x_TI: Tensor, in_rows_NI: Tensor, out_rows_NO: Tensor, rows: RowIndex, like: Tensor
) -> Tensor:
    p_RI = in_rows_NI.index_select(0, rows.in_page_R).to(like.dtype)
    q_RO = out_rows_NO.index_select(0, rows.out_page_R).to(like.dtype)
    dot_R = (x_TI.index_select(0, rows.token_R).to(like.dtype) * p_RI).sum(1) * rows.gate_R
    return dot_R.to(like.dtype)[:, None] * q_RO


def _thin_products(
    x_TI: Tensor, in_rows_NI: Tensor, out_rows_NO: Tensor, batch: RunBatch
) -> Tensor:
    p_AKI = _gathered(in_rows_NI, batch.in_page_AK)
    q_AKO = _gathered(out_rows_NO, batch.out_page_AK)
    x_ALI = _gathered(x_TI, batch.token_AL).to(p_AKI.dtype)
    dot_ALK = torch.bmm(x_ALI, p_AKI.transpose(1, 2)) * batch.gate_A.to(p_AKI.dtype)[:, None, None]
    return torch.bmm(dot_ALK, q_AKO)


def _gathered(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`, whose backward adds rows instead of scattering elements."""
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)
