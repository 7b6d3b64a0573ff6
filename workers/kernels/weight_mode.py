"""Weight mode: base and delta of runs of many tokens in one pass over W0, the delta never in memory.

    y = x W0ᵀ + x ΔWᵀ,   ΔW = W0 ∘ (shift + Σ_k a_k b_kᵀ)

One launch for the runs of all adapters: a program takes a tile of one run's tokens and a tile of outputs. On its way
through W0 it makes the tile of Σ a_k b_kᵀ with a small product, multiplies it into the tile of W0 it holds, rounds that
delta on its own (never the merged matrix, whose rounding would swallow it), and feeds the matrix unit twice.

Operations: per tile of 128 tokens 2 · (2 + r₁₆/128) · 128 · I · O, r₁₆ the rank up to the next 16: 2.13 times the base
layer at rank 16, where row mode costs 17; the multiplications into W0 (128 × 64 a step, on the vector units) run beside
the 4 M operations of the step's two products. Bytes: W0 from memory once per wave of programs, as in any product.

The epilogue is the one of `outputs.py`, so a run with a scale, add rows and a bias of its own costs no further launch.

Shape legend: T tokens in the step, D splits of P dots, F page numbers, J tiles of C columns, N bank pages, I input
features, O output features, K mul rows, 16 at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.outputs import (
    COLUMNS,
    FIRST_TOKEN,
    IN_PAGES,
    NUM_ROWS,
    NUM_TOKENS,
    OUT_PAGES,
    SHIFT,
    operand_type,
    write_outputs,
)
from workers.kernels.tiles import Tiles

_BLOCK_K = 16


@triton.jit(do_not_specialize=["num_dot_splits", "dots_stride"])
def _weight_mode(
    y,
    y_stride,
    x,
    in_rows,
    out_rows,
    weight,
    weight_stride_o,
    weight_stride_i,
    in_features,
    out_features,
    dots,
    dots_stride,
    num_dot_splits,
    base_bias,
    page_F,
    tile_JC,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    IS_APART: tl.constexpr,
    NUM_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tile_JC + tl.program_id(0) * COLUMNS
    num_tokens = tl.load(tile + NUM_TOKENS)
    if num_tokens == 0:
        return
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_O = o < out_features
    t = tl.arange(0, BLOCK_T)
    in_T = t < num_tokens
    num_mul = tl.load(tile + NUM_ROWS)
    in_pages = page_F + tl.load(tile + IN_PAGES)
    out_pages = page_F + tl.load(tile + OUT_PAGES)
    shift = tl.load(tile + SHIFT).to(tl.float32, bitcast=True)
    token = (tl.load(tile + FIRST_TOKEN) + t).to(tl.int64)
    x_T = x + token[:, None] * in_features
    w_O = weight + o.to(tl.int64)[:, None] * weight_stride_o
    # Outputs are the rows here, so that the delta goes from registers to the matrix unit and not through shared memory.
    acc_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    delta_OT = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for i0 in range(0, in_features, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        in_I = i < in_features
        pattern_OI = tl.full((BLOCK_O, BLOCK_I), 0.0, tl.float32) + shift
        for c in tl.static_range(NUM_K):
            k = c * BLOCK_K + tl.arange(0, BLOCK_K)
            in_K = k < num_mul
            a_page = tl.load(out_pages + k, mask=in_K, other=0).to(tl.int64)
            b_page = tl.load(in_pages + k, mask=in_K, other=0).to(tl.int64)
            a_OK = tl.load(
                out_rows + a_page[None, :] * out_features + o[:, None],
                mask=in_O[:, None] & in_K[None, :],
                other=0.0,
            )
            b_KI = tl.load(
                in_rows + b_page[:, None] * in_features + i[None, :],
                mask=in_K[:, None] & in_I[None, :],
                other=0.0,
            )
            pattern_OI = tl.dot(
                a_OK.to(OPERAND), b_KI.to(OPERAND), pattern_OI, input_precision="ieee"
            )
        w_OI = tl.load(
            w_O + i[None, :] * weight_stride_i, mask=in_O[:, None] & in_I[None, :], other=0.0
        )
        x_TI = tl.load(x_T + i[None, :], mask=in_T[:, None] & in_I[None, :], other=0.0).to(OPERAND)
        delta_OI = (w_OI.to(tl.float32) * pattern_OI).to(weight.dtype.element_ty)
        acc_OT = tl.dot(w_OI.to(OPERAND), tl.trans(x_TI), acc_OT, input_precision="ieee")
        if IS_APART:
            delta_OT = tl.dot(
                delta_OI.to(OPERAND), tl.trans(x_TI), delta_OT, input_precision="ieee"
            )
        else:
            acc_OT = tl.dot(delta_OI.to(OPERAND), tl.trans(x_TI), acc_OT, input_precision="ieee")
    if IS_APART:
        acc_OT += delta_OT
    write_outputs(
        tl.trans(acc_OT), tile, o, y, y_stride, dots, dots_stride, num_dot_splits, out_rows, out_features, base_bias,
        page_F, HAS_BIAS, HAS_DOTS, BLOCK_T, BLOCK_K, OPERAND,
    )  # fmt: skip


def weight_mode(
    y_TO: Tensor,
    x_TI: Tensor,
    in_rows_NI: Tensor,
    out_rows_NO: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    dots_DP: Tensor | None,
    page_F: Tensor,
    tile_JC: Tensor,
    max_mul: int,
    tiles: Tiles,
) -> None:
    """Write the outputs of the tokens in `tile_JC` into `y_TO`.

    Args:
        max_mul: the highest number of mul rows of a tile's adapter; it chooses the compiled kernel, not the numbers.
    """
    if not len(tile_JC):
        return
    out_features, in_features = weight_OI.shape
    dots = y_TO if dots_DP is None else dots_DP
    _weight_mode[(len(tile_JC), triton.cdiv(out_features, tiles.outs))](
        y_TO,
        y_TO.stride(0),
        x_TI,
        in_rows_NI,
        out_rows_NO,
        weight_OI,
        weight_OI.stride(0),
        weight_OI.stride(1),
        in_features,
        out_features,
        dots,
        dots.stride(0),
        dots.shape[0],
        out_rows_NO if bias_O is None else bias_O,
        page_F,
        tile_JC,
        HAS_BIAS=bias_O is not None,
        HAS_DOTS=dots_DP is not None,
        # Summed into one accumulator, a small delta is rounded as coarsely as the base: too coarse for float32's bound.
        IS_APART=x_TI.dtype == torch.float32,
        NUM_K=triton.next_power_of_2(triton.cdiv(max_mul, _BLOCK_K)),
        BLOCK_T=tiles.rows,
        BLOCK_O=tiles.outs,
        BLOCK_I=tiles.ins,
        BLOCK_K=_BLOCK_K,
        OPERAND=operand_type(x_TI.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
