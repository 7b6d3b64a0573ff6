"""The last step of every adapted layer: each token's rows summed, scaled, its add rows and bias added, rounded once.

    y_t = c ∘ Σ_j a_j ∘ z_tj  +  Σ_e d_te q_e  +  bias'

One launch, or two when a step has both short and long runs. A run of a few tokens is computed token by token on the
vector units, a longer one in tiles whose `q` rows are read once for all of the tile's tokens.

Bytes: z (4 · R · O · splits) and y, both still in the L2 cache in a decode step, and the step's a and q rows (2 · O
each) once per token of a short run. Floor for 32 tokens of rank 3 and O = 6144: 3 MB of z per split and 1 MB of a,
about a microsecond beside the 18 that W0 takes; operations do not count. z stays in float32 because it is summed here.

A row of nothing is selected away by its number; nothing is multiplied by a mask.

Shape legend: T tokens in the step, R rows of the stacked product, Z splits of it, P dots, D splits of them, F page
numbers, J tiles of C columns, N bank pages, O output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.step_tables import TILE_COLUMNS, TILE_WORDS
from workers.kernels.tiles import Tiles

FIRST_TOKEN = tl.constexpr(TILE_COLUMNS.index("first_token"))
NUM_TOKENS = tl.constexpr(TILE_COLUMNS.index("num_tokens"))
FIRST_ROW = tl.constexpr(TILE_COLUMNS.index("first_row"))
NUM_ROWS = tl.constexpr(TILE_COLUMNS.index("num_rows"))
IN_PAGES = tl.constexpr(TILE_COLUMNS.index("in_pages"))
OUT_PAGES = tl.constexpr(TILE_COLUMNS.index("out_pages"))
FIRST_DOT = tl.constexpr(TILE_COLUMNS.index("first_dot"))
NUM_ADD = tl.constexpr(TILE_COLUMNS.index("num_add"))
ADD_IN_PAGES = tl.constexpr(TILE_COLUMNS.index("add_in_pages"))
ADD_OUT_PAGES = tl.constexpr(TILE_COLUMNS.index("add_out_pages"))
SCALE_PAGE = tl.constexpr(TILE_COLUMNS.index("scale_page"))
BIAS_PAGE = tl.constexpr(TILE_COLUMNS.index("bias_page"))
GATE = tl.constexpr(TILE_COLUMNS.index("gate"))
SHIFT = tl.constexpr(TILE_COLUMNS.index("shift"))
COLUMNS = tl.constexpr(TILE_WORDS)


def operand_type(dtype: torch.dtype) -> tl.constexpr:
    """What matrix products take their operands in: the type itself on a GPU.

    Triton's interpreter multiplies bfloat16 wrongly (it keeps them as 16-bit integers). There the values, already
    rounded to `dtype`, are multiplied as float32, which is what the matrix unit does with them: exact products, summed
    in float32.
    """
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]


@triton.jit
def write_outputs(
    acc_TO,
    tile,
    o,
    y,
    y_stride,
    dots,
    dots_stride,
    num_dot_splits,
    out_rows,
    out_features,
    base_bias,
    page_F,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Scale, add rows, bias, and the store, for one tile of tokens of one adapter and some of its outputs."""
    in_O = o < out_features
    t = tl.arange(0, BLOCK_T)
    in_T = t < tl.load(tile + NUM_TOKENS)
    scale_page = tl.load(tile + SCALE_PAGE)  # of c − 1
    if scale_page >= 0:
        scale = tl.load(out_rows + scale_page.to(tl.int64) * out_features + o, mask=in_O, other=0.0)
        acc_TO += acc_TO * scale.to(tl.float32)[None, :]
    if HAS_DOTS:
        num_add = tl.load(tile + NUM_ADD)
        pages = page_F + tl.load(tile + ADD_OUT_PAGES)
        first_dot = tl.load(tile + FIRST_DOT)
        for e0 in range(0, num_add, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            in_E = e < num_add
            page = tl.load(pages + e, mask=in_E, other=0).to(tl.int64)
            q_EO = tl.load(
                out_rows + page[:, None] * out_features + o[None, :],
                mask=in_E[:, None] & in_O[None, :],
                other=0.0,
            )
            if BLOCK_T == 1:
                d_E = tl.zeros((BLOCK_E,), tl.float32)
                for s in range(num_dot_splits):
                    d_E += tl.load(dots + s * dots_stride + first_dot + e, mask=in_E, other=0.0)
                acc_TO += tl.sum(d_E[:, None] * q_EO.to(tl.float32), axis=0)[None, :]
            else:
                d_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
                where = first_dot + t[:, None] * num_add + e[None, :]
                for s in range(num_dot_splits):
                    d_TE += tl.load(
                        dots + s * dots_stride + where,
                        mask=in_T[:, None] & in_E[None, :],
                        other=0.0,
                    )
                d_TE = d_TE.to(out_rows.dtype.element_ty).to(OPERAND)
                acc_TO = tl.dot(d_TE, q_EO.to(OPERAND), acc_TO, input_precision="ieee")
    bias_page = tl.load(tile + BIAS_PAGE)  # of bias' − bias
    if bias_page >= 0:
        bias = tl.load(out_rows + bias_page.to(tl.int64) * out_features + o, mask=in_O, other=0.0)
        acc_TO += bias.to(tl.float32)[None, :]
    if HAS_BIAS:
        acc_TO += tl.load(base_bias + o, mask=in_O, other=0.0).to(tl.float32)[None, :]
    token = (tl.load(tile + FIRST_TOKEN) + t).to(tl.int64)
    tl.store(
        y + token[:, None] * y_stride + o[None, :],
        acc_TO.to(y.dtype.element_ty),
        mask=in_T[:, None] & in_O[None, :],
    )


# What differs from step to step is not compiled in: a new kernel takes a second.
@triton.jit(do_not_specialize=["num_z_splits", "num_dot_splits", "dots_stride"])
def _sum_rows(
    y,
    y_stride,
    z,
    z_split_stride,
    z_row_stride,
    num_z_splits,
    dots,
    dots_stride,
    num_dot_splits,
    out_rows,
    out_features,
    base_bias,
    page_F,
    tile_JC,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tile_JC + tl.program_id(0) * COLUMNS
    num_tokens = tl.load(tile + NUM_TOKENS)
    if num_tokens == 0:
        return
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_O = o < out_features
    t = tl.arange(0, BLOCK_T)
    mask_TO = (t < num_tokens)[:, None] & in_O[None, :]
    num_rows = tl.load(tile + NUM_ROWS)
    row = (tl.load(tile + FIRST_ROW) + t * num_rows).to(tl.int64)
    pages = page_F + tl.load(tile + OUT_PAGES)
    acc_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for j in range(num_rows):
        where = z + (row + j)[:, None] * z_row_stride + o[None, :]
        sum_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for s in range(num_z_splits):
            part_TO = tl.load(where + s * z_split_stride, mask=mask_TO, other=0.0)
            sum_TO += part_TO.to(tl.float32)
        page = tl.load(pages + j)
        a_O = tl.load(
            out_rows + page.to(tl.int64) * out_features + o, mask=in_O & (page >= 0), other=1.0
        )
        acc_TO += sum_TO * a_O.to(tl.float32)[None, :]
    write_outputs(
        acc_TO, tile, o, y, y_stride, dots, dots_stride, num_dot_splits, out_rows, out_features, base_bias,
        page_F, HAS_BIAS, HAS_DOTS, BLOCK_T, BLOCK_E, OPERAND,
    )  # fmt: skip


def sum_rows(
    y_TO: Tensor,
    z_ZRO: Tensor,
    dots_DP: Tensor | None,
    out_rows_NO: Tensor,
    bias_O: Tensor | None,
    page_F: Tensor,
    tile_JC: Tensor,
    tiles: Tiles,
) -> None:
    """Write the outputs of the tokens in `tile_JC`, `tiles.rows` of them at most in one, into `y_TO`.

    Args:
        y_TO: may be `z_ZRO[0]` itself where row i is token i: a program reads what it writes, before it writes it.
    """
    if not len(tile_JC):
        return
    out_features = y_TO.shape[1]
    dots = z_ZRO if dots_DP is None else dots_DP
    _sum_rows[(len(tile_JC), triton.cdiv(out_features, tiles.outs))](
        y_TO,
        y_TO.stride(0),
        z_ZRO,
        z_ZRO.stride(0),
        z_ZRO.stride(1),
        z_ZRO.shape[0],
        dots,
        dots.stride(0),
        dots.shape[0],
        out_rows_NO,
        out_features,
        out_rows_NO if bias_O is None else bias_O,
        page_F,
        tile_JC,
        HAS_BIAS=bias_O is not None,
        HAS_DOTS=dots_DP is not None,
        BLOCK_T=tiles.rows,
        BLOCK_O=tiles.outs,
        BLOCK_E=tiles.ins,
        OPERAND=operand_type(out_rows_NO.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
