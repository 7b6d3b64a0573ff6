"""Attention over pages of keys and values, and writing them: what `workers.attention.pages` runs on a GPU.

torch's own variable-length attention takes a block table only with FlashAttention 3 installed beside it, so these are
kernels of ours. A program takes a tile of one sequence's new tokens, with all query heads of one key/value head as its
rows, and walks the sequence's pages once with a running maximum (FlashAttention, arXiv 2205.14135).

Bytes of a decode step: every key and value of every sequence once, 2 · L · K · D · 2, which is the floor. So that a few
long sequences keep all processors reading, a decoding sequence is walked in chunks by several programs whose parts a
second launch combines. Chunks begin at fixed positions: a token's result does not depend on its neighbours' lengths.

Behind a sequence's last token lies whatever the page's last owner left there; it is not loaded.

Shape legend: T tokens in the step, K key/value heads, G query heads per key/value head, D head dimension, L tokens
attended over, M rows (token, query head), N sequences, B blocks of one, J tiles of S columns, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.outputs import operand_type

TILE_COLUMNS = ("first_token", "num_tokens", "first_position", "sequence")
CHUNK_TOKENS = 512

FIRST_TOKEN = tl.constexpr(TILE_COLUMNS.index("first_token"))
NUM_TOKENS = tl.constexpr(TILE_COLUMNS.index("num_tokens"))
FIRST_POSITION = tl.constexpr(TILE_COLUMNS.index("first_position"))
SEQUENCE = tl.constexpr(TILE_COLUMNS.index("sequence"))
COLUMNS = tl.constexpr(len(TILE_COLUMNS))
_LOG2_E = 1.4426950408889634


# What differs from step to step is not compiled in: a new kernel takes a second.
@triton.jit(do_not_specialize=["blocks_per_sequence", "chunk_tokens"])
def _attend(
    output,
    part,
    part_max,
    part_sum,
    query,
    query_stride,
    keys,
    values,
    block_NB,
    blocks_per_sequence,
    tile_JS,
    scale_log2,
    chunk_tokens,
    NUM_K: tl.constexpr,
    NUM_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    tile = tile_JS + tl.program_id(0) * COLUMNS
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    num_tokens = tl.load(tile + NUM_TOKENS)
    first_position = tl.load(tile + FIRST_POSITION)
    length = first_position + num_tokens
    first = chunk * chunk_tokens
    if (num_tokens == 0) | (first >= length):
        return
    last = tl.minimum(first + chunk_tokens, length)
    blocks = block_NB + tl.load(tile + SEQUENCE) * blocks_per_sequence
    m = tl.arange(0, BLOCK_M)
    t = m // NUM_G
    in_M = t < num_tokens
    d = tl.arange(0, BLOCK_D)
    in_D = d < HEAD_DIM
    token = (tl.load(tile + FIRST_TOKEN) + t).to(tl.int64)
    query_head = head * NUM_G + m % NUM_G
    q_MD = tl.load(
        query + token[:, None] * query_stride + query_head[:, None] * HEAD_DIM + d[None, :],
        mask=in_M[:, None] & in_D[None, :],
        other=0.0,
    ).to(OPERAND)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    max_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    for l0 in range(first, last, BLOCK_L):
        l_L = l0 + tl.arange(0, BLOCK_L)
        in_L = l_L < last
        block = tl.load(blocks + l_L // BLOCK_TOKENS, mask=in_L, other=0).to(tl.int64)
        place = ((block * BLOCK_TOKENS + l_L % BLOCK_TOKENS) * NUM_K + head) * HEAD_DIM
        where = place[:, None] + d[None, :]
        mask_LD = in_L[:, None] & in_D[None, :]
        k_LD = tl.load(keys + where, mask=mask_LD, other=0.0).to(OPERAND)
        v_LD = tl.load(values + where, mask=mask_LD, other=0.0)
        score_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee") * scale_log2
        seen_ML = in_L[None, :] & (l_L[None, :] <= (first_position + t)[:, None])
        score_ML = tl.where(seen_ML, score_ML, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_ML, axis=1))
        # A row that has seen nothing yet must not subtract infinity from itself.
        from_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        weight_ML = tl.exp2(score_ML - from_M[:, None])
        fade_M = tl.exp2(max_M - from_M)
        sum_M = sum_M * fade_M + tl.sum(weight_ML, axis=1)
        rounded_ML = weight_ML.to(values.dtype.element_ty).to(OPERAND)
        acc_MD = tl.dot(
            rounded_ML, v_LD.to(OPERAND), acc_MD * fade_M[:, None], input_precision="ieee"
        )
        max_M = new_max_M
    row = (token * NUM_K + head) * NUM_G + m % NUM_G
    if IS_SINGLE:
        tl.store(
            output + row[:, None] * HEAD_DIM + d[None, :],
            (acc_MD / sum_M[:, None]).to(output.dtype.element_ty),
            mask=in_M[:, None] & in_D[None, :],
        )
    else:
        row = row * tl.num_programs(2) + chunk
        tl.store(
            part + row[:, None] * HEAD_DIM + d[None, :],
            acc_MD,
            mask=in_M[:, None] & in_D[None, :],
        )
        tl.store(part_max + row, max_M, mask=in_M)
        tl.store(part_sum + row, sum_M, mask=in_M)


@triton.jit(do_not_specialize=["num_chunks"])
def _combine(
    output, part, part_max, part_sum, tile_JS, num_chunks, chunk_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For tiles of one token each."""
    tile = tile_JS + tl.program_id(0) * COLUMNS
    num_tokens = tl.load(tile + NUM_TOKENS)
    if num_tokens == 0:
        return
    live = tl.cdiv(tl.load(tile + FIRST_POSITION) + num_tokens, chunk_tokens)
    row = tl.load(tile + FIRST_TOKEN).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    at = row * num_chunks + c
    in_C = c < live
    max_C = tl.load(part_max + at, mask=in_C, other=float("-inf"))
    sum_C = tl.load(part_sum + at, mask=in_C, other=0.0)
    mask_CD = in_C[:, None] & (d < HEAD_DIM)[None, :]
    part_CD = tl.load(part + at[:, None] * HEAD_DIM + d[None, :], mask=mask_CD, other=0.0)
    share_C = tl.exp2(max_C - tl.max(max_C, axis=0))
    mixed_D = tl.sum(part_CD * share_C[:, None], axis=0) / tl.sum(sum_C * share_C, axis=0)
    tl.store(output + row * HEAD_DIM + d, mixed_D.to(output.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def _write(
    keys, values, key, value, key_stride, value_stride, place_T, num_features,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(place_T + token)
    f = tl.arange(0, BLOCK_F)
    in_F = f < num_features
    k = tl.load(key + token * key_stride + f, mask=in_F)
    v = tl.load(value + token * value_stride + f, mask=in_F)
    tl.store(keys + place * num_features + f, k, mask=in_F)
    tl.store(values + place * num_features + f, v, mask=in_F)


def write_pages(
    keys: Tensor, values: Tensor, key_TKD: Tensor, value_TKD: Tensor, place_T: Tensor
) -> None:
    """Put each token's key and value at its place, counted in tokens from the first page. Heads lie side by side."""
    num_features = key_TKD.shape[1] * key_TKD.shape[2]
    if len(place_T):
        _write[(len(place_T),)](
            keys, values, key_TKD, value_TKD, key_TKD.stride(0), value_TKD.stride(0), place_T,
            num_features, BLOCK_F=triton.next_power_of_2(num_features),
        )  # fmt: skip


def attend_pages(
    output_THD: Tensor,
    query_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    block_NB: Tensor,
    tile_JS: Tensor,
    scale: float,
    *,
    tokens_per_tile: int,
    max_length: int,
) -> None:
    """Write the attention of the tokens in `tile_JS` into `output_THD`, which is contiguous.

    Args:
        keys, values: pages of a layer, [blocks, block tokens, K, D].
        tokens_per_tile: at most; with 1, long sequences are walked in chunks.
        max_length: no sequence is longer; it chooses how many programs there are, not the numbers.
    """
    if not len(tile_JS):
        return
    num_heads, head_dim = query_THD.shape[1:]
    block_tokens, num_kv_heads = keys.shape[1:3]
    group = num_heads // num_kv_heads
    chunk_tokens = CHUNK_TOKENS if tokens_per_tile == 1 else max_length
    num_chunks = triton.cdiv(max_length, chunk_tokens)
    is_single = num_chunks == 1
    is_narrow = query_THD.itemsize <= 2  # float32 has no matrix unit, and needs twice the registers
    rows = query_THD.shape[0] * num_heads * num_chunks
    part = output_THD if is_single else output_THD.new_empty(rows, head_dim, dtype=torch.float32)
    maximum = output_THD if is_single else output_THD.new_empty(rows, dtype=torch.float32)
    total = output_THD if is_single else output_THD.new_empty(rows, dtype=torch.float32)
    _attend[(len(tile_JS), num_kv_heads, num_chunks)](
        output_THD, part, maximum, total, query_THD, query_THD.stride(0), keys, values, block_NB,
        block_NB.shape[1], tile_JS, scale * _LOG2_E, chunk_tokens,
        NUM_K=num_kv_heads,
        NUM_G=group,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=max(16, triton.next_power_of_2(tokens_per_tile * group)),
        BLOCK_L=64 if is_narrow else 16,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        IS_SINGLE=is_single,
        OPERAND=operand_type(query_THD.dtype),
        num_warps=4 if is_narrow else 8,
        num_stages=3 if is_narrow else 2,
    )  # fmt: skip
    if not is_single:
        _combine[(len(tile_JS), num_heads)](
            output_THD, part, maximum, total, tile_JS, num_chunks, chunk_tokens,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_C=triton.next_power_of_2(num_chunks),
            BLOCK_D=triton.next_power_of_2(head_dim), num_warps=1,
        )  # fmt: skip
