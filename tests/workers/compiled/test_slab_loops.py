"""Slabs with compiled loops against the same slabs with torch's attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.compiled.compiler import library
from workers.attention.slabs import SlabAttention
from workers.compiled.decoder_loops import SlabLoops
from workers.models.runner import SequenceSpan

NUM_SLOTS, MAX_TOKENS, HEAD_DIM = 5, 40, 32
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def slabs(dtype: torch.dtype, kv_heads: int, *, compiled: bool) -> SlabAttention:
    return SlabAttention(
        num_layers=1,
        num_slots=NUM_SLOTS,
        num_kv_heads=kv_heads,
        max_tokens_per_slot=MAX_TOKENS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        loops=SlabLoops(library(), dtype) if compiled else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    steps=st.lists(
        st.dictionaries(st.integers(0, NUM_SLOTS - 1), st.integers(1, 6), min_size=1),
        min_size=1,
        max_size=6,
    ),
    kv_heads=st.sampled_from([1, 2]),
    group=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_chunks_and_single_tokens_give_what_torch_gives(
    dtype: torch.dtype, steps: list[dict[int, int]], kv_heads: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(len(steps) + group)
    ours, theirs = (slabs(dtype, kv_heads, compiled=compiled) for compiled in (True, False))
    cached = [0] * NUM_SLOTS
    for step in steps:
        spans = [SequenceSpan(slot, cached[slot], count) for slot, count in step.items()]
        tokens = sum(step.values())
        query, key, value = (
            torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype)
            for heads in (group * kv_heads, kv_heads, kv_heads)
        )
        outputs = []
        for attention in (ours, theirs):
            attention.begin_step(spans)
            outputs.append(attention.attend(0, query, key, value, HEAD_DIM**-0.5))
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(*outputs, rtol=bound, atol=bound)
        for slot, count in step.items():
            cached[slot] += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_sequence_stays_alone(dtype: torch.dtype) -> None:
    """A NaN or an overflow in one slot shows in its own output and in no other."""
    attention = slabs(dtype, 1, compiled=True)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 1, HEAD_DIM, generator=generator).to(dtype)
    query = torch.randn(2, 2, HEAD_DIM, generator=generator).to(dtype)
    outputs = []
    for broken in (0.0, torch.nan, torch.inf):
        if broken:
            key[1] = value[1] = broken
        attention.begin_step([SequenceSpan(0, 0, 1), SequenceSpan(3, 0, 1)])
        outputs.append(attention.attend(0, query, key, value, 1.0))
    healthy, *others = outputs
    for output in others:
        assert torch.equal(output[0], healthy[0])
        assert output[1].isnan().any()
