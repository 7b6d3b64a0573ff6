"""Row mode: base rows and mul rows of all tokens through W0 in one launch, so that W0 is read once.

    z_r = (x_t(r) ∘ b_p(r)) W0ᵀ

The scaled input is made in registers on its way to the matrix unit and rounded there to the model's type, as in
`workers.row_form`. A base row has no page and reads nothing but x.

Bytes: W0 (2 · I · O) once from memory; each program of 128 outputs also reads x and b of its rows, from the L2 cache,
where a token's rows find the same x in L1. Operations: 2 · R · I · O. For 6144 × 6144 on an H200 W0 takes 18 µs at
4.3 TB/s, and 128 rows take 12 µs of the matrix unit, so up to about 200 rows memory is the floor. A tile of all rows
(up to 128) × 128 outputs reads as many bytes of x and b as of W0; narrower ones read more than the L2 cache gives. That
leaves 48 programs for 132 processors, so the input features are split, and the parts are summed, in a fixed order, by
the kernel that also sums a token's rows (`outputs.py`).

Rows are rows of a matrix product: a broken adapter's numbers stay in its own rows.

Shape legend: T tokens in the step, R stacked rows, Z splits of the input features, N bank pages, I input features,
O output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.outputs import operand_type
from workers.kernels.tiles import Tiles


@triton.jit(do_not_specialize=["num_rows"])
def _stacked_rows(
    z,
    z_stride,
    x,
    in_rows,
    weight,
    weight_stride_o,
    weight_stride_i,
    row_token_R,
    row_page_R,
    num_rows,
    in_features,
    out_features,
    features_per_split,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OPERAND: tl.constexpr,
):
    # Row tiles are the fastest to change: those that share a piece of W0 run together and find it in the cache.
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(2)
    in_R = r < num_rows
    in_O = o < out_features
    token = tl.load(row_token_R + r, mask=in_R, other=-1)
    if tl.max(token, axis=0) < 0:
        return
    page = tl.load(row_page_R + r, mask=in_R, other=-1)
    x_R = x + token.to(tl.int64)[:, None] * in_features
    b_R = in_rows + page.to(tl.int64)[:, None] * in_features
    w_O = weight + o.to(tl.int64)[:, None] * weight_stride_o
    acc_RO = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, in_features)
    for i0 in range(first, last, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I)
        in_I = i < in_features
        x_RI = tl.load(x_R + i[None, :], mask=(token >= 0)[:, None] & in_I[None, :], other=0.0)
        b_RI = tl.load(b_R + i[None, :], mask=(page >= 0)[:, None] & in_I[None, :], other=1.0)
        w_OI = tl.load(
            w_O + i[None, :] * weight_stride_i, mask=in_O[:, None] & in_I[None, :], other=0.0
        )
        scaled_RI = (x_RI.to(tl.float32) * b_RI.to(tl.float32)).to(x.dtype.element_ty)
        acc_RO = tl.dot(
            scaled_RI.to(OPERAND), tl.trans(w_OI.to(OPERAND)), acc_RO, input_precision="ieee"
        )
    tl.store(
        z + split.to(tl.int64) * z_stride + r.to(tl.int64)[:, None] * out_features + o[None, :],
        acc_RO,
        mask=in_R[:, None] & in_O[None, :],
    )


def stacked_rows(
    x_TI: Tensor,
    in_rows_NI: Tensor,
    weight_OI: Tensor,
    row_token_R: Tensor,
    row_page_R: Tensor,
    tiles: Tiles,
) -> Tensor:
    """z_ZRO in float32, whose sum over Z is the stacked product. Rows without a token hold anything.

    Args:
        x_TI, in_rows_NI: contiguous, of the type of `weight_OI`, which may have any strides.
    """
    num_rows, (out_features, in_features) = len(row_token_R), weight_OI.shape
    z_ZRO = torch.empty(
        tiles.splits, num_rows, out_features, dtype=torch.float32, device=x_TI.device
    )
    features_per_split = tiles.features_per_split(in_features)
    grid = (
        triton.cdiv(num_rows, tiles.rows),
        triton.cdiv(out_features, tiles.outs),
        tiles.splits,
    )
    _stacked_rows[grid](
        z_ZRO,
        z_ZRO.stride(0),
        x_TI,
        in_rows_NI,
        weight_OI,
        weight_OI.stride(0),
        weight_OI.stride(1),
        row_token_R,
        row_page_R,
        num_rows,
        in_features,
        out_features,
        features_per_split,
        BLOCK_R=tiles.rows,
        BLOCK_O=tiles.outs,
        BLOCK_I=tiles.ins,
        OPERAND=operand_type(x_TI.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return z_ZRO
