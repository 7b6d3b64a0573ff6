"""Add rows, first half: the dots d_te = g · x_t · p_e of every token with its own adapter's rows, ranks as they are.

The second half, Σ_e d_te q_e, is part of `outputs.py`: the two are one launch each, as SGMV's shrink and expand.

Bytes: p once per tile of a run's tokens (2 · I per row; decode: once per token), x once per 16 rows. Floor for 64
tokens of 64 adapters, rank 16, I = 6144: 12.6 MB of p, 3 µs at 4.3 TB/s, and as much again for q. A program takes up
to 16 rows of one tile and a part of the input features, so that there are enough programs to keep every processor
reading; the parts are summed in a fixed order where the dots are used.

A program sees rows of one adapter and tokens of one run, so nothing broken can reach a neighbour.

Shape legend: T tokens in the step, P dots, D splits of the input features, F page numbers, J tiles of C columns, N bank
pages, I input features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.outputs import (
    ADD_IN_PAGES,
    COLUMNS,
    FIRST_DOT,
    FIRST_TOKEN,
    GATE,
    NUM_ADD,
    NUM_TOKENS,
    operand_type,
)
from workers.kernels.tiles import Tiles


@triton.jit(do_not_specialize=["dots_stride"])
def _dot_add_rows(
    dots,
    dots_stride,
    x,
    in_rows,
    in_features,
    features_per_split,
    page_F,
    tile_JC,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tile_JC + tl.program_id(0) * COLUMNS
    split = tl.program_id(1)
    num_tokens = tl.load(tile + NUM_TOKENS)
    if num_tokens == 0:
        return
    first_token = tl.load(tile + FIRST_TOKEN)
    num_add = tl.load(tile + NUM_ADD)
    pages = page_F + tl.load(tile + ADD_IN_PAGES)
    gate = tl.load(tile + GATE).to(tl.float32, bitcast=True)
    where = dots + split.to(tl.int64) * dots_stride + tl.load(tile + FIRST_DOT)
    t = tl.arange(0, BLOCK_T)
    in_T = t < num_tokens
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, in_features)
    for e0 in range(0, num_add, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        in_E = e < num_add
        page = tl.load(pages + e, mask=in_E, other=0)
        p_E = in_rows + page.to(tl.int64)[:, None] * in_features
        if BLOCK_T == 1:
            x_1 = x + first_token.to(tl.int64) * in_features
            acc_EI = tl.zeros((BLOCK_E, BLOCK_I), tl.float32)
            for i0 in range(first, last, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I)
                in_I = i < in_features
                x_I = tl.load(x_1 + i, mask=in_I, other=0.0).to(tl.float32)
                p_EI = tl.load(p_E + i[None, :], mask=in_E[:, None] & in_I[None, :], other=0.0)
                acc_EI += x_I[None, :] * p_EI.to(tl.float32)
            tl.store(where + e, tl.sum(acc_EI, axis=1) * gate, mask=in_E)
        else:
            x_T = x + (first_token + t).to(tl.int64)[:, None] * in_features
            acc_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
            for i0 in range(first, last, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I)
                in_I = i < in_features
                x_TI = tl.load(x_T + i[None, :], mask=in_T[:, None] & in_I[None, :], other=0.0)
                p_EI = tl.load(p_E + i[None, :], mask=in_E[:, None] & in_I[None, :], other=0.0)
                acc_TE = tl.dot(
                    x_TI.to(OPERAND), tl.trans(p_EI.to(OPERAND)), acc_TE, input_precision="ieee"
                )
            tl.store(
                where + t[:, None] * num_add + e[None, :],
                acc_TE * gate,
                mask=in_T[:, None] & in_E[None, :],
            )


def dot_add_rows(
    dots_DP: Tensor,
    x_TI: Tensor,
    in_rows_NI: Tensor,
    page_F: Tensor,
    tile_JC: Tensor,
    tiles: Tiles,
) -> None:
    """Write the dots of the tokens in `tile_JC` into `dots_DP` (float32), whose sum over D they are."""
    if not len(tile_JC):
        return
    in_features = x_TI.shape[1]
    _dot_add_rows[(len(tile_JC), tiles.splits)](
        dots_DP,
        dots_DP.stride(0),
        x_TI,
        in_rows_NI,
        in_features,
        tiles.features_per_split(in_features),
        page_F,
        tile_JC,
        BLOCK_T=tiles.rows,
        BLOCK_E=tiles.outs,
        BLOCK_I=tiles.ins,
        OPERAND=operand_type(x_TI.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def empty_dots(num_dots: int, splits: int, device: torch.device) -> Tensor:
    """dots_DP for `dot_add_rows`."""
    return torch.empty(splits, num_dots, dtype=torch.float32, device=device)
