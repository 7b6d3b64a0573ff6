"""Attention over one contiguous slab of keys and values per sequence.

A decode step reads the slabs where they lie: neighbouring slots form one batch, a strided view of the cache, and the
query heads that share a key/value head stand as query rows of that head, so nothing is repeated or copied.

Stale data never reaches a live sequence, by two rules. Masked positions are selected away with a bias of -inf, and
what lies behind a sequence's last token is always zero (`_clear_behind`), because a masked probability of 0 still
multiplies the value it masks, and 0 · inf is NaN. Different slots are different rows of a batch and never meet.
Compiled loops read each sequence to its own end and no further, so with them nothing need be cleared.

Shape legend: T tokens in the step, S slots of a run, H query heads, K key/value heads, G query heads per key/value
head, M tokens a slot can hold, L tokens attended over, N new tokens of a span, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workers.attention.block_store import BlockStore
from workers.attention.lazy_memory import lazy_zeros
from workers.compiled.decoder_loops import SlabLoops
from workers.models.runner import KvCopy, SequenceSpan

# Slots without a decoding sequence that are computed along (and thrown away) rather than splitting a batch in two.
MAX_GAP = 2


@dataclass(frozen=True, slots=True)
class _DecodeRun:
    """Sequences with one new token each, in neighbouring slots."""

    slots: slice
    num_tokens: int  # L: of the longest
    token_of_slot_S: (
        slice | Tensor
    )  # the query row of every slot of the run; any row for an idle slot
    live: slice | Tensor  # which slots of the run are not idle
    token_of_live: slice | Tensor
    bias_S11L: Tensor


@dataclass(frozen=True, slots=True)
class _DecodeIndex:
    """The same for compiled loops, which read each sequence to its own end."""

    token_N: Tensor
    slot_N: Tensor
    length_N: Tensor


@dataclass(frozen=True, slots=True)
class _PrefillSpan:
    """One sequence with several new tokens."""

    slot: int
    tokens: slice
    num_tokens: int  # L
    bias_NL: Tensor | None  # None: no cached prefix, plainly causal


class SlabAttention:
    """An `AttentionBackend` with the keys and values of layer i in two tensors [slots, K, M, D].

    Memory is reserved for all slots and blocks, but on CPU the machine only spends it on pages that were written.

    Args:
        num_blocks, block_tokens: of the store that saved blocks are kept in; without any, nothing can be saved.
        loops: compiled loops for decoding; None: torch's own attention.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_tokens_per_slot: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int = 0,
        block_tokens: int = 1,
        loops: SlabLoops | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.max_tokens_per_slot = max_tokens_per_slot
        self._dtype = dtype
        self._device = device
        whole_blocks = -(-max_tokens_per_slot // block_tokens) * block_tokens
        shape = (num_slots, num_kv_heads, whole_blocks, head_dim)
        self._keys_SKMD = [lazy_zeros(shape, dtype, device) for _ in range(num_layers)]
        self._values_SKMD = [lazy_zeros(shape, dtype, device) for _ in range(num_layers)]
        slabs = [*self._keys_SKMD, *self._values_SKMD]
        self._store = BlockStore(slabs, num_blocks, block_tokens)
        self._block_tokens = block_tokens
        self._written = [0] * num_slots  # tokens of each slot that may be other than zero
        self._held = [0] * num_slots  # tokens of each slot that its last sequence stored there
        self._loops = loops
        self._decode: list[_DecodeRun] = []
        self._decode_index: _DecodeIndex | None = None
        self._prefill: list[_PrefillSpan] = []
        self._slot_T = self._position_T = torch.empty(0, dtype=torch.int64)

    def begin_step(
        self,
        spans: Sequence[SequenceSpan],
        saves: Sequence[KvCopy] = (),
        restores: Sequence[KvCopy] = (),
    ) -> None:
        """Raises ValueError for a span that does not fit its slot, or two spans in one slot."""
        self._store.save(saves)
        self._store.restore(restores)
        restored = {copy.kv_slot: 0 for copy in restores}
        for copy in restores:
            restored[copy.kv_slot] = max(restored[copy.kv_slot], copy.start + self._block_tokens)
        for slot, num_tokens in restored.items():
            self._held[slot] = num_tokens
            self._written[slot] = max(self._written[slot], num_tokens)
        self._check(spans)
        for span in spans:
            if self._loops is None:
                self._clear_behind(span)
            self._written[span.kv_slot] = self._held[span.kv_slot] = span.num_total
        starts, total = [], 0
        for span in spans:
            starts.append(total)
            total += span.num_new
        self._index_tokens(spans, total)
        decode = sorted(
            (span.kv_slot, span.num_total, start)
            for span, start in zip(spans, starts, strict=True)
            if span.num_new == 1
        )
        if self._loops is None:
            self._decode = [self._decode_run(run) for run in _runs(decode)]
        elif decode:
            slot_N, length_N, token_N = torch.tensor(decode).T.contiguous()
            self._decode_index = _DecodeIndex(token_N, slot_N, length_N)
        else:
            self._decode_index = None
        self._prefill = [
            self._prefill_span(span, start)
            for span, start in zip(spans, starts, strict=True)
            if span.num_new > 1
        ]

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        keys_SKMD, values_SKMD = self._keys_SKMD[layer], self._values_SKMD[layer]
        if self._loops is None:
            keys_SKMD[self._slot_T, :, self._position_T] = key_TKD
            values_SKMD[self._slot_T, :, self._position_T] = value_TKD
        else:
            self._loops.keep(
                key_TKD, value_TKD, self._slot_T, self._position_T, keys_SKMD, values_SKMD
            )
        output_THD = query_THD.new_empty(query_THD.shape)
        num_kv_heads, head_dim = key_TKD.shape[1:]
        group = query_THD.shape[1] // num_kv_heads
        # decode
        if self._loops is not None and self._decode_index is not None:
            index = self._decode_index
            self._loops.attend(
                *(query_THD, index.token_N, index.slot_N, index.length_N),
                *(keys_SKMD, values_SKMD, scale, output_THD),
            )
        for run in self._decode:
            attended_SKGD = scaled_dot_product_attention(
                query_THD[run.token_of_slot_S].reshape(-1, num_kv_heads, group, head_dim),
                keys_SKMD[run.slots, :, : run.num_tokens],
                values_SKMD[run.slots, :, : run.num_tokens],
                attn_mask=run.bias_S11L,
                scale=scale,
            )
            output_THD[run.token_of_live] = attended_SKGD[run.live].flatten(1, 2)
        # prefill
        for span in self._prefill:
            slot = slice(span.slot, span.slot + 1)
            attended_1HND = scaled_dot_product_attention(
                query_THD[span.tokens].transpose(0, 1)[None],
                keys_SKMD[slot, :, : span.num_tokens],
                values_SKMD[slot, :, : span.num_tokens],
                attn_mask=span.bias_NL,
                is_causal=span.bias_NL is None,
                scale=scale,
                enable_gqa=True,
            )
            output_THD[span.tokens] = attended_1HND[0].transpose(0, 1)
        return output_THD

    def _check(self, spans: Sequence[SequenceSpan]) -> None:
        slots = [span.kv_slot for span in spans]
        if len(set(slots)) != len(slots):
            raise ValueError(f"two spans of one step share a KV slot: {sorted(slots)}")
        for span in spans:
            if span.num_new < 1 or span.num_total > self.max_tokens_per_slot:
                raise ValueError(f"{span} does not fit a slot of {self.max_tokens_per_slot} tokens")
            if span.num_cached not in (0, self._held[span.kv_slot]):
                raise ValueError(f"{span} does not start where its slot's tokens end")

    def _clear_behind(self, span: SequenceSpan) -> None:
        stale = slice(span.num_cached, self._written[span.kv_slot])
        if stale.start < stale.stop:
            for slab_SKMD in (*self._keys_SKMD, *self._values_SKMD):
                slab_SKMD[span.kv_slot, :, stale] = 0

    def _index_tokens(self, spans: Sequence[SequenceSpan], num_tokens: int) -> None:
        count = torch.tensor([span.num_new for span in spans], dtype=torch.int64)
        slot = torch.tensor([span.kv_slot for span in spans], dtype=torch.int64)
        cached = torch.tensor([span.num_cached for span in spans], dtype=torch.int64)
        span_of_T = torch.repeat_interleave(count, output_size=num_tokens)
        within_T = torch.arange(num_tokens) - (count.cumsum(0) - count)[span_of_T]
        self._slot_T = slot[span_of_T].to(self._device, non_blocking=True)
        self._position_T = (cached[span_of_T] + within_T).to(self._device, non_blocking=True)

    def _decode_run(self, run: list[tuple[int, int, int]]) -> _DecodeRun:
        first, last = run[0][0], run[-1][0]
        num_slots = last - first + 1
        longest = max(num_total for _, num_total, _ in run)
        num_total_S = [
            1
        ] * num_slots  # an idle slot attends to one token: a row of -inf has no softmax
        token_of_slot_S = [run[0][2]] * num_slots
        for slot, num_total, token in run:
            num_total_S[slot - first] = num_total
            token_of_slot_S[slot - first] = token
        seen_SL = torch.arange(longest) < torch.tensor(num_total_S)[:, None]
        tokens = [token for _, _, token in run]
        return _DecodeRun(
            slots=slice(first, last + 1),
            num_tokens=longest,
            token_of_slot_S=self._rows(token_of_slot_S),
            live=self._rows([slot - first for slot, _, _ in run]),
            token_of_live=self._rows(tokens),
            bias_S11L=self._bias(seen_SL)[:, None, None],
        )

    def _prefill_span(self, span: SequenceSpan, start: int) -> _PrefillSpan:
        bias_NL = None
        if span.num_cached:
            position_N = torch.arange(span.num_cached, span.num_total)
            bias_NL = self._bias(torch.arange(span.num_total) <= position_N[:, None])
        return _PrefillSpan(
            slot=span.kv_slot,
            tokens=slice(start, start + span.num_new),
            num_tokens=span.num_total,
            bias_NL=bias_NL,
        )

    def _bias(self, seen: Tensor) -> Tensor:
        bias = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, -math.inf)
        return bias.to(self._device, non_blocking=True)

    def _rows(self, rows: list[int]) -> slice | Tensor:
        """An index that is a view where the rows follow one another, and a gather where they do not."""
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        return torch.tensor(rows, dtype=torch.int64).to(self._device, non_blocking=True)


def _runs(decode: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Split (slot, …) entries, ascending by slot, where more than MAX_GAP slots lie idle between two."""
    runs: list[list[tuple[int, int, int]]] = []
    for entry in decode:
        if runs and entry[0] - runs[-1][-1][0] <= MAX_GAP + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
