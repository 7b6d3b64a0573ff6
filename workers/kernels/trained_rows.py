"""Row mode's loops of training on a GPU: what stands around the two products of `workers.row_form.trained_rows`.

    stack     tokens, then b_j ∘ x of every mul row         (also of G, by a_j)
    sum       each token's base row + Σ_j a_j ∘ z_j         (also of h, by b_j)
    da, db    Σ of G ∘ z_j, x ∘ h_j over each bank page's rows, in two launches: parts, then their sums

Bytes, with 16 bits: stacking reads x once and writes 2 · W for each row of the product, summing reads those of z again,
and da and db read z and h once more. That is 12 · W a mul row and step, 17 ns for W = 6144 at 4.3 TB/s, beside 190 ns
that it takes in the two products at 790 TFLOP/s. Bank rows (4 · W) and what tokens share come from the caches. torch's
operations move about 32 · W for the stacking alone, through five tensors of as many rows.

Nothing is added atomically. A token's rows are summed in their own order; a page's rows by parts of `PART_ROWS`, each
by one program, and then the parts in theirs. So numbers are the same to the bit from run to run and whoever else is in
the step. What a tile does not hold is selected away, never multiplied by a mask: no broken adapter reaches another's.

Counted, and checked in Triton's interpreter; not yet run on a GPU.

Shape legend: T tokens, W input or output features, N bank pages, R mul rows of the step, B tokens that need the base
product, M = B + R, P parts of pages.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.tiles import page_tiles, token_tiles
from workers.row_form.module_index import ModuleIndex
from workers.row_form.trained_rows import mul_rows


@triton.jit(do_not_specialize=["num_tokens", "num_base"])
def _stack_rows(
    rows,
    x,
    bank,
    page_R,
    first_T1,
    base_row_T,
    num_tokens,
    num_base,
    width,
    IS_ALL_BASE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_T = t < num_tokens
    in_W = (w < width)[None, :]
    x_TW = tl.load(x + t[:, None] * width + w[None, :], mask=in_T[:, None] & in_W, other=0.0)
    base = t
    if not IS_ALL_BASE:
        base = tl.load(base_row_T + t, mask=in_T, other=-1)
    is_base = in_T & (base >= 0)
    tl.store(rows + base[:, None] * width + w[None, :], x_TW, mask=is_base[:, None] & in_W)
    first = tl.load(first_T1 + t, mask=in_T, other=0)
    count = tl.load(first_T1 + t + 1, mask=in_T, other=0) - first
    for j in range(tl.max(count, axis=0)):
        row = first + j
        has_row = j < count
        page = tl.load(page_R + row, mask=has_row, other=0)
        has_TW = has_row[:, None] & in_W
        b_TW = tl.load(bank + page[:, None] * width + w[None, :], mask=has_TW, other=0.0)
        scaled_TW = (x_TW.to(tl.float32) * b_TW).to(rows.dtype.element_ty)
        tl.store(rows + (num_base + row)[:, None] * width + w[None, :], scaled_TW, mask=has_TW)


@triton.jit(do_not_specialize=["num_tokens", "num_base"])
def _sum_token_rows(
    y,
    rows,
    bank,
    page_R,
    first_T1,
    base_row_T,
    num_tokens,
    num_base,
    width,
    IS_ALL_BASE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_T = t < num_tokens
    in_W = (w < width)[None, :]
    base = t
    if not IS_ALL_BASE:
        base = tl.load(base_row_T + t, mask=in_T, other=-1)
    is_base = in_T & (base >= 0)
    acc_TW = tl.load(
        rows + base[:, None] * width + w[None, :], mask=is_base[:, None] & in_W, other=0.0
    ).to(tl.float32)
    first = tl.load(first_T1 + t, mask=in_T, other=0)
    count = tl.load(first_T1 + t + 1, mask=in_T, other=0) - first
    for j in range(tl.max(count, axis=0)):
        row = first + j
        has_row = j < count
        page = tl.load(page_R + row, mask=has_row, other=0)
        has_TW = has_row[:, None] & in_W
        a_TW = tl.load(bank + page[:, None] * width + w[None, :], mask=has_TW, other=0.0)
        z_TW = tl.load(
            rows + (num_base + row)[:, None] * width + w[None, :], mask=has_TW, other=0.0
        )
        acc_TW = tl.where(has_TW, acc_TW + z_TW.to(tl.float32) * a_TW, acc_TW)
    tl.store(
        y + t[:, None] * width + w[None, :],
        acc_TW.to(y.dtype.element_ty),
        mask=in_T[:, None] & in_W,
    )


@triton.jit
def _sum_parts_of_pages(
    part,
    x,
    rows,
    token_R,
    row_R,
    begin_P,
    end_P,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    begin = tl.load(begin_P + tl.program_id(0))
    end = tl.load(end_P + tl.program_id(0))
    if begin >= end:
        return
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_W = w < width
    acc_RW = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        in_R = r < end
        row = tl.load(row_R + r, mask=in_R, other=0)
        token = tl.load(token_R + row, mask=in_R, other=0)
        in_RW = in_R[:, None] & in_W[None, :]
        x_RW = tl.load(x + token[:, None] * width + w[None, :], mask=in_RW, other=0.0)
        z_RW = tl.load(rows + row[:, None] * width + w[None, :], mask=in_RW, other=0.0)
        acc_RW += x_RW.to(tl.float32) * z_RW.to(tl.float32)
    where = part + tl.program_id(0).to(tl.int64) * width + w
    tl.store(where, tl.sum(acc_RW, axis=0), mask=in_W)


@triton.jit
def _sum_pages(gradient, part, first_part_N1, width, BLOCK_W: tl.constexpr):
    page = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_W = w < width
    acc_W = tl.zeros((BLOCK_W,), tl.float32)
    for p in range(tl.load(first_part_N1 + page), tl.load(first_part_N1 + page + 1)):
        acc_W += tl.load(part + p * width + w, mask=in_W, other=0.0)
    tl.store(gradient + page * width + w, acc_W, mask=in_W)


class KernelTrainedLoops:
    """A `TrainedLoops` of a base in float32 or 16 bits, with rows in float32. Reserved pages get no gradient."""

    def stack_inputs(self, x_TI: Tensor, in_rows_NI: Tensor, index: ModuleIndex) -> Tensor:
        return _stacked(x_TI.contiguous(), in_rows_NI, mul_rows(index).in_page_R, index)

    def sum_outputs(
        self, z_MO: Tensor, out_rows_NO: Tensor, index: ModuleIndex, *, is_last: bool
    ) -> Tensor:
        shape = index.num_tokens, z_MO.shape[1]
        if is_last and index.base_token_B is None:
            # The rows behind are kept for the backward anyway; a program reads what it writes, before it writes it.
            y_TO = z_MO[: index.num_tokens]
        else:
            y_TO = z_MO.new_empty(shape, dtype=z_MO.dtype if is_last else torch.float32)
        _sum(y_TO, z_MO, out_rows_NO, mul_rows(index).out_page_R, index)
        return y_TO

    def stack_gradients(
        self, gradient_TO: Tensor, z_RO: Tensor, out_rows_NO: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        gradient_TO = gradient_TO.contiguous()
        rows_MO = _stacked(gradient_TO, out_rows_NO, mul_rows(index).out_page_R, index)
        return rows_MO, _by_page(gradient_TO, z_RO, out_rows_NO, "out", index)

    def finish_gradients(
        self, x_TI: Tensor, h_MI: Tensor, in_rows_NI: Tensor, index: ModuleIndex
    ) -> tuple[Tensor, Tensor]:
        x_TI = x_TI.contiguous()
        db_NI = _by_page(x_TI, h_MI[index.num_base_tokens :], in_rows_NI, "in", index)
        dx_TI = torch.empty_like(x_TI)
        _sum(dx_TI, h_MI, in_rows_NI, mul_rows(index).in_page_R, index)
        return dx_TI, db_NI


def _stacked(x_TW: Tensor, rows_NW: Tensor, page_R: Tensor, index: ModuleIndex) -> Tensor:
    """rows_MW: those of the base tokens, then those of tokens scaled by their bank row, rounded once."""
    _check_rows(rows_NW)
    width, tiles = x_TW.shape[1], token_tiles(x_TW.shape[1])
    rows_MW = x_TW.new_empty(index.num_base_tokens + page_R.shape[0], width)
    _stack_rows[(triton.cdiv(index.num_tokens, tiles.rows), triton.cdiv(width, tiles.outs))](
        rows_MW, x_TW, rows_NW, page_R, *_of_tokens(index), width,
        IS_ALL_BASE=index.base_row_T is None, BLOCK_T=tiles.rows, BLOCK_W=tiles.outs,
        num_warps=tiles.warps,
    )  # fmt: skip
    return rows_MW


def _sum(y_TW: Tensor, z_MW: Tensor, rows_NW: Tensor, page_R: Tensor, index: ModuleIndex) -> None:
    """`_stacked` the other way round: each token's rows summed in float32 and rounded once, into `y_TW`."""
    _check_rows(rows_NW)
    width, tiles = y_TW.shape[1], token_tiles(y_TW.shape[1])
    _sum_token_rows[(triton.cdiv(index.num_tokens, tiles.rows), triton.cdiv(width, tiles.outs))](
        y_TW, z_MW, rows_NW, page_R, *_of_tokens(index), width,
        IS_ALL_BASE=index.base_row_T is None, BLOCK_T=tiles.rows, BLOCK_W=tiles.outs,
        num_warps=tiles.warps,
    )  # fmt: skip


def _of_tokens(index: ModuleIndex) -> tuple[Tensor, Tensor, int, int]:
    """first_T1, base_row_T or what stands in for it, T and B."""
    first_T1 = mul_rows(index).first_T1
    base_row_T = first_T1 if index.base_row_T is None else index.base_row_T
    return first_T1, base_row_T, index.num_tokens, index.num_base_tokens


def _by_page(
    x_TW: Tensor, z_RW: Tensor, rows_NW: Tensor, side: Literal["in", "out"], index: ModuleIndex
) -> Tensor:
    """gradient_NW: Σ x ∘ z over the rows of each page, zeros where there are none."""
    num_pages, width = rows_NW.shape
    mul, tiles = mul_rows(index), page_tiles(width)
    pages = mul.by_page(side, num_pages)
    num_parts, num_blocks = pages.begin_P.shape[0], triton.cdiv(width, tiles.outs)
    part_PW = rows_NW.new_empty(num_parts, width)
    gradient_NW = torch.empty_like(rows_NW)
    _sum_parts_of_pages[(num_parts, num_blocks)](
        part_PW, x_TW, z_RW, mul.token_R, pages.row_R, pages.begin_P, pages.end_P, width,
        BLOCK_R=tiles.rows, BLOCK_W=tiles.outs, num_warps=tiles.warps,
    )  # fmt: skip
    _sum_pages[(num_pages, num_blocks)](
        gradient_NW, part_PW, pages.first_part_N1, width, BLOCK_W=tiles.outs,
        num_warps=tiles.warps,
    )  # fmt: skip
    return gradient_NW


def _check_rows(rows_NW: Tensor) -> None:
    if rows_NW.dtype != torch.float32 or not rows_NW.is_contiguous():
        raise TypeError("trained rows are contiguous float32")
