"""Slab attention against attention written out over each sequence on its own.

Shape legend: T tokens in the step, H query heads, K key/value heads, D head dimension, L tokens of one sequence.
"""

from __future__ import annotations

import math

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.slabs import SlabAttention
from workers.models.runner import KvCopy, SequenceSpan

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_TOKENS, NUM_SLOTS = 4, 2, 8, 24, 9
NUM_BLOCKS, BLOCK_TOKENS = 7, 5  # no divisor of MAX_TOKENS


def slab_attention(dtype: torch.dtype = torch.float64) -> SlabAttention:
    return SlabAttention(
        num_layers=2,
        num_slots=NUM_SLOTS,
        num_kv_heads=NUM_KV_HEADS,
        max_tokens_per_slot=MAX_TOKENS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
        num_blocks=NUM_BLOCKS,
        block_tokens=BLOCK_TOKENS,
    )


class Conversation:
    """One sequence's queries, keys and values from its first token on."""

    def __init__(self, slot: int, length: int, generator: torch.Generator) -> None:
        def normal(heads: int) -> Tensor:
            return torch.randn(length, heads, HEAD_DIM, generator=generator, dtype=torch.float64)

        self.slot = slot
        self.cached = 0
        self.query_LHD, self.key_LKD, self.value_LKD = (
            normal(NUM_HEADS),
            normal(NUM_KV_HEADS),
            normal(NUM_KV_HEADS),
        )

    def expected(self, start: int, stop: int) -> Tensor:
        group = NUM_HEADS // NUM_KV_HEADS
        rows = []
        for position in range(start, stop):
            heads = []
            for head in range(NUM_HEADS):
                keys = self.key_LKD[: position + 1, head // group]
                values = self.value_LKD[: position + 1, head // group]
                scores = keys @ self.query_LHD[position, head] / math.sqrt(HEAD_DIM)
                heads.append(torch.softmax(scores, 0) @ values)
            rows.append(torch.stack(heads))
        return torch.stack(rows)


def step(
    attention: SlabAttention,
    parts: list[tuple[Conversation, int]],
    saves: tuple[KvCopy, ...] = (),
    restores: tuple[KvCopy, ...] = (),
) -> Tensor:
    spans = [SequenceSpan(one.slot, one.cached, count) for one, count in parts]
    attention.begin_step(spans, saves, restores)

    def stream(name: str) -> Tensor:
        return torch.cat(
            [getattr(one, name)[one.cached : one.cached + count] for one, count in parts]
        )

    out = attention.attend(
        1, stream("query_LHD"), stream("key_LKD"), stream("value_LKD"), HEAD_DIM**-0.5
    )
    for one, count in parts:
        one.cached += count
    return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mix_of_chunks_and_single_tokens_equals_each_sequence_alone(
    data: st.DataObject,
) -> None:
    slots = data.draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, min_size=1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    running = [Conversation(slot, MAX_TOKENS, generator) for slot in slots]
    attention = slab_attention()
    for _ in range(data.draw(st.integers(1, 6))):
        parts = []
        for one in data.draw(st.permutations(running)):
            count = data.draw(st.integers(0, 4))
            if count and one.cached + count <= MAX_TOKENS:
                parts.append((one, count))
        if parts:
            starts = [one.cached for one, _ in parts]
            got = step(attention, parts)
            expected = torch.cat(
                [
                    one.expected(start, start + count)
                    for (one, count), start in zip(parts, starts, strict=True)
                ]
            )
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_a_broken_sequence_left_behind_reaches_nobody(poison: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for value in (1.0, poison):
        attention = slab_attention()
        generator.manual_seed(0)
        live = Conversation(0, MAX_TOKENS, generator)
        broken = Conversation(1, MAX_TOKENS, generator)
        beside = Conversation(2, MAX_TOKENS, generator)
        for tensor in (broken.query_LHD, broken.key_LKD, broken.value_LKD):
            tensor[2:] = value
        seen = [step(attention, [(live, 3), (broken, 12), (beside, 9)])[[0, 1, 2, -1]]]
        seen.append(step(attention, [(live, 1), (broken, 1), (beside, 1)])[[0, 2]])
        # The broken one leaves; its slot is idle among decoding ones, then another sequence begins there.
        seen.append(step(attention, [(live, 1), (beside, 1)]))
        heir = Conversation(1, MAX_TOKENS, generator)
        seen.append(step(attention, [(live, 1), (heir, 2), (beside, 1)]))
        seen.append(step(attention, [(live, 1), (heir, 1), (beside, 1)]))
        outputs.append(torch.cat(seen))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])


def test_idle_slots_between_decoding_ones_are_not_copied_nor_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = slab_attention()
    near, far, farthest = (Conversation(slot, MAX_TOKENS, generator) for slot in (0, 3, 8))
    step(attention, [(near, 5), (far, 2), (farthest, 7)])
    got = step(attention, [(farthest, 1), (near, 1), (far, 1)])
    expected = torch.cat([farthest.expected(7, 8), near.expected(5, 6), far.expected(2, 3)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_saved_block_serves_another_slot_after_its_own_was_given_away() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = slab_attention()
    first = Conversation(0, MAX_TOKENS, generator)
    step(attention, [(first, 12)])
    heir = Conversation(0, MAX_TOKENS, generator)
    # Block 6 is saved and restored within one step, while another sequence writes over where it stood.
    saves = (KvCopy(6, 0, 5), KvCopy(2, 0, 0))
    again = Conversation(4, MAX_TOKENS, generator)
    again.query_LHD, again.key_LKD, again.value_LKD = (
        first.query_LHD,
        first.key_LKD,
        first.value_LKD,
    )
    again.cached = 10
    got = step(attention, [(heir, 12), (again, 1)], saves, (KvCopy(2, 4, 0), KvCopy(6, 4, 5)))
    torch.testing.assert_close(got[:12], heir.expected(0, 12), rtol=0, atol=1e-12)
    torch.testing.assert_close(got[12:], first.expected(10, 11), rtol=0, atol=1e-12)
    got = step(attention, [(again, 3), (heir, 1)])
    torch.testing.assert_close(got[:3], first.expected(11, 14), rtol=0, atol=1e-12)


def test_a_restored_prefix_is_needed_before_a_sequence_may_start_behind_it() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = slab_attention()
    left_behind = Conversation(0, MAX_TOKENS, generator)
    step(attention, [(left_behind, 12)])
    with pytest.raises(ValueError, match="does not start where its slot's tokens end"):
        attention.begin_step([SequenceSpan(0, 10, 1)])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([SequenceSpan(0, 0, 2), SequenceSpan(0, 0, 1)], "share a KV slot"),
        ([SequenceSpan(0, 0, MAX_TOKENS + 1)], "does not fit"),
        ([SequenceSpan(0, 0, 0)], "does not fit"),
        ([SequenceSpan(0, 3, 1)], "does not start where its slot's tokens end"),
    ],
)
def test_spans_that_make_no_sense_are_refused(spans: list[SequenceSpan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slab_attention().begin_step(spans)


def test_memory_is_spent_on_written_pages_only() -> None:
    def resident_bytes() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident_bytes()
    attention = SlabAttention(
        num_layers=4,
        num_slots=64,
        num_kv_heads=4,
        max_tokens_per_slot=4096,
        head_dim=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )  # 2 GiB if it were touched
    attention.begin_step([SequenceSpan(0, 0, 4)])
    key_TKD = torch.ones(4, 4, 64)
    out = attention.attend(0, torch.ones(4, 8, 64), key_TKD, key_TKD, 0.125)
    assert torch.equal(out, torch.ones(4, 8, 64))
    assert resident_bytes() - before < 64 << 20
