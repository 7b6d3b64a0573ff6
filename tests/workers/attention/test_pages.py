"""Pages against plain attention of each sequence alone, by torch and by the kernels in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.attention.test_slabs import (
    HEAD_DIM,
    MAX_TOKENS,
    NUM_KV_HEADS,
    NUM_SLOTS,
    Conversation,
)
from workers.attention.pages import PagedAttention
from workers.models.runner import SequenceSpan

BLOCK_TOKENS, NUM_BLOCKS = 4, NUM_SLOTS * MAX_TOKENS // 4
WAYS = pytest.mark.parametrize(
    ("tile_tokens", "dtype"), [(None, torch.float64), (3, torch.float32)], ids=["torch", "kernels"]
)
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def paged(tile_tokens: int | None, dtype: torch.dtype) -> PagedAttention:
    return PagedAttention(
        num_layers=2,
        num_slots=NUM_SLOTS,
        num_kv_heads=NUM_KV_HEADS,
        max_tokens_per_slot=MAX_TOKENS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        num_blocks=NUM_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        tile_tokens=tile_tokens,
    )


def step(
    attention: PagedAttention,
    parts: list[tuple[Conversation, int]],
    blocks: dict[int, list[int]],
) -> Tensor:
    """One step; `blocks` by slot."""
    attention.begin_step(
        [SequenceSpan(one.slot, one.cached, count, tuple(blocks[one.slot])) for one, count in parts]
    )

    def stream(name: str) -> Tensor:
        return torch.cat(
            [getattr(one, name)[one.cached : one.cached + count] for one, count in parts]
        ).to(attention.keys[1].dtype)

    out = attention.attend(
        1, stream("query_LHD"), stream("key_LKD"), stream("value_LKD"), HEAD_DIM**-0.5
    )
    for one, count in parts:
        one.cached += count
    return out


def own_blocks(seed: int) -> dict[int, list[int]]:
    """Every slot's blocks, scattered over the pages."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    each = MAX_TOKENS // BLOCK_TOKENS
    return {slot: order[slot * each : (slot + 1) * each] for slot in range(NUM_SLOTS)}


@WAYS
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_mix_of_chunks_and_single_tokens_equals_each_sequence_alone(
    tile_tokens: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    slots = data.draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    blocks = own_blocks(data.draw(st.integers(0, 9)))
    running = [Conversation(slot, MAX_TOKENS, generator) for slot in slots]
    attention = paged(tile_tokens, dtype)
    for _ in range(data.draw(st.integers(1, 3))):
        parts = []
        for one in data.draw(st.permutations(running)):
            count = data.draw(st.integers(0, 8))
            if count and one.cached + count <= MAX_TOKENS:
                parts.append((one, count))
        if parts:
            starts = [one.cached for one, _ in parts]
            got = step(attention, parts, blocks)
            expected = torch.cat(
                [
                    one.expected(start, start + count)
                    for (one, count), start in zip(parts, starts, strict=True)
                ]
            )
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_are_walked_in_chunks_and_put_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.kernels.paged_attention.CHUNK_TOKENS", 8)
    generator = torch.Generator().manual_seed(0)
    attention, blocks = paged(64, dtype), own_blocks(0)
    first, second = Conversation(0, MAX_TOKENS, generator), Conversation(5, MAX_TOKENS, generator)
    step(attention, [(first, 20), (second, 5)], blocks)
    got = step(attention, [(first, 1), (second, 1)], blocks)
    expected = torch.cat([first.expected(20, 21), second.expected(5, 6)])
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=limit)


@WAYS
def test_sequences_share_the_pages_of_a_common_prefix(
    tile_tokens: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = paged(tile_tokens, dtype)
    one, other = Conversation(0, MAX_TOKENS, generator), Conversation(1, MAX_TOKENS, generator)
    for name in ("query_LHD", "key_LKD", "value_LKD"):
        getattr(other, name)[:8] = getattr(one, name)[:8]
    blocks = {0: [7, 2, 9, 4], 1: [7, 2, 11, 3]}
    step(attention, [(one, 11)], blocks)
    other.cached = 8
    got = step(attention, [(other, 3), (one, 1)], blocks)
    expected = torch.cat([other.expected(8, 11), one.expected(11, 12)])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=LIMIT[dtype])


@WAYS
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_a_page_held_before_reaches_nobody(
    tile_tokens: int | None, dtype: torch.dtype, poison: float
) -> None:
    outputs = []
    for value in (1.0, poison):
        attention = paged(tile_tokens, dtype)
        for pages in (*attention.keys, *attention.values):
            pages.fill_(value)
        generator = torch.Generator().manual_seed(0)
        live, beside = (Conversation(slot, MAX_TOKENS, generator) for slot in (0, 1))
        blocks = own_blocks(1)
        seen = [step(attention, [(live, 6), (beside, 1)], blocks)]
        seen.append(step(attention, [(beside, 1), (live, 1)], blocks))
        outputs.append(torch.cat(seen))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([SequenceSpan(0, 0, MAX_TOKENS + 1, tuple(range(9)))], "does not fit"),
        ([SequenceSpan(0, 0, 0, (1,))], "does not fit"),
        ([SequenceSpan(0, 4, 1, (1,))], "too few blocks"),
        ([SequenceSpan(0, 0, 1, (NUM_BLOCKS,))], "outside"),
        ([SequenceSpan(0, 0, 1, (1,)), SequenceSpan(1, 2, 1, (1,))], "the same block"),
    ],
)
def test_spans_that_make_no_sense_are_refused(spans: list[SequenceSpan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged(None, torch.float32).begin_step(spans)
