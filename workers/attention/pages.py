"""Attention over pages: a block id of the ledger is the page itself, so a shared prefix is shared and never copied.

Knows nothing of who owns a block (`blocks.py` does) nor of what a page holds behind a sequence's last token, which it
never reads: a last owner's NaN would survive a probability of 0.

`attend_with_torch` is the reference, and what runs where the kernels cannot.

Shape legend: T tokens in the step, H query heads, K key/value heads, D head dimension, L tokens of one sequence, N new
tokens of a span, B blocks of one sequence, J tiles of S columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workers.models.runner import KvCopy, SequenceSpan

_TILE_WORDS = 4  # first token, tokens, first position, sequence


@dataclass(frozen=True, slots=True)
class PageStep:
    """One step, as the kernels read it; int32 on the device, except places. Views of one buffer."""

    place_T: Tensor  # int64: where a token's key and value go, in tokens from the first page
    block_NB: Tensor
    single_JS: Tensor  # spans of one new token
    tile_JS: Tensor  # tiles of longer spans
    max_length: int  # of the longest sequence


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How many entries each part of a step has room for."""

    tokens: int
    sequences: int
    blocks: int  # of one sequence
    singles: int
    tiles: int
    max_length: int

    def views(self, buffer: Tensor) -> PageStep:
        """The step that `PagedAttention.pack` wrote into this buffer of 32-bit words."""
        counts = [
            2 * self.tokens,
            self.sequences * self.blocks,
            _TILE_WORDS * self.singles,
            _TILE_WORDS * self.tiles,
        ]
        rooms = torch.split(buffer, [_aligned(count) for count in counts])
        places, blocks, singles, tiles = (
            room[:count] for room, count in zip(rooms, counts, strict=True)
        )
        return PageStep(
            place_T=places.view(torch.int64),
            block_NB=blocks.view(self.sequences, self.blocks),
            single_JS=singles.view(-1, _TILE_WORDS),
            tile_JS=tiles.view(-1, _TILE_WORDS),
            max_length=self.max_length,
        )


def _aligned(words: int) -> int:
    """Parts begin at 16 bytes each: kernels are compiled anew for addresses that are aligned otherwise."""
    return -(-words // 4) * 4


class PagedAttention:
    """An `AttentionBackend` with the keys and values of layer i in two tensors [blocks, block tokens, K, D].

    Args:
        num_slots: sequences of a step at most.
        num_blocks: ids are below it; one page more is nobody's.
        tile_tokens: new tokens of one tile; None: no kernels, torch's own attention sequence by sequence.
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
        num_blocks: int,
        block_tokens: int,
        tile_tokens: int | None,
    ) -> None:
        self.num_slots = num_slots
        self.max_tokens_per_slot = max_tokens_per_slot
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._device = device
        self._tile_tokens = tile_tokens
        shape = (num_blocks + 1, block_tokens, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._spans: tuple[SequenceSpan, ...] = ()
        self.step: PageStep | None = None  # may be set to one that a recorded graph reads

    def begin_step(
        self,
        spans: Sequence[SequenceSpan],
        saves: Sequence[KvCopy] = (),
        restores: Sequence[KvCopy] = (),
    ) -> None:
        """Saves and restores need nothing here. Raises ValueError for a span whose blocks do not hold it."""
        self.step = self._upload(spans)
        self._spans = tuple(spans)

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        if self.step is None:
            raise RuntimeError("begin_step comes before attend")
        if self._tile_tokens is None:
            return self.attend_with_torch(layer, query_THD, key_TKD, value_TKD, scale)
        return self._attend_with_kernels(self.step, layer, query_THD, key_TKD, value_TKD, scale)

    def attend_with_torch(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """`attend`, each sequence's pages gathered."""
        if self.step is None:
            raise RuntimeError("begin_step comes before attend")
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.step.place_T, key_TKD)
        values.flatten(0, 1).index_copy_(0, self.step.place_T, value_TKD)
        outputs = []
        start = 0
        for number, span in enumerate(self._spans):
            query_HND = query_THD[start : start + span.num_new].transpose(0, 1)
            start += span.num_new
            blocks = self.step.block_NB[number, : self._blocks_for(span.num_total)]
            key_KLD, value_KLD = (
                pages.index_select(0, blocks).flatten(0, 1)[: span.num_total].transpose(0, 1)
                for pages in (keys, values)
            )
            position_L = torch.arange(span.num_total, device=self._device)
            unseen_NL = position_L > position_L[span.num_cached :, None]
            bias_NL = query_THD.new_zeros(unseen_NL.shape).masked_fill_(unseen_NL, -math.inf)
            attended_HND = scaled_dot_product_attention(
                query_HND[None],
                key_KLD[None],
                value_KLD[None],
                attn_mask=bias_NL,
                scale=scale,
                enable_gqa=True,
            )[0]
            outputs.append(attended_HND.transpose(0, 1))
        return torch.cat(outputs) if outputs else torch.empty_like(query_THD)

    def _attend_with_kernels(
        self,
        step: PageStep,
        layer: int,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        scale: float,
    ) -> Tensor:
        from workers.kernels.paged_attention import attend_pages, write_pages

        keys, values = self.keys[layer], self.values[layer]
        query_THD, key_TKD, value_TKD = (
            x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
            for x in (query_THD, key_TKD, value_TKD)
        )
        write_pages(keys, values, key_TKD, value_TKD, step.place_T)
        output_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        for tile_JS, tokens_per_tile in (
            (step.single_JS, 1),
            (step.tile_JS, self._tile_tokens or 1),
        ):
            attend_pages(
                output_THD,
                query_THD,
                keys,
                values,
                step.block_NB,
                tile_JS,
                scale,
                tokens_per_tile=tokens_per_tile,
                max_length=step.max_length,
            )
        return output_THD

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def check(self, spans: Sequence[SequenceSpan]) -> None:
        """Raises ValueError for a span whose blocks do not hold it."""
        written: set[int] = set()
        for span in spans:
            if span.num_new < 1 or span.num_total > self.max_tokens_per_slot:
                raise ValueError(
                    f"{span} does not fit a sequence of {self.max_tokens_per_slot} tokens"
                )
            if self._blocks_for(span.num_total) > len(span.blocks):
                raise ValueError(f"{span} has too few blocks of {self.block_tokens} tokens")
            if not all(0 <= block < self.num_blocks for block in span.blocks):
                raise ValueError(f"{span} names a block outside 0 to {self.num_blocks - 1}")
            last = self._blocks_for(span.num_total)
            mine = span.blocks[span.num_cached // self.block_tokens : last]
            if not written.isdisjoint(mine):
                raise ValueError(f"two spans of one step write to the same block: {span}")
            written.update(mine)

    def _upload(self, spans: Sequence[SequenceSpan]) -> PageStep:
        self.check(spans)
        layout = PageLayout(
            tokens=sum(span.num_new for span in spans),
            sequences=len(spans),
            blocks=max((self._blocks_for(span.num_total) for span in spans), default=0),
            singles=sum(span.num_new == 1 for span in spans),
            tiles=sum(self._tiles_of(span) for span in spans),
            max_length=max((span.num_total for span in spans), default=0),
        )
        words = torch.from_numpy(self.pack(spans, layout))
        return layout.views(words.to(self._device, non_blocking=True))

    def pack(self, spans: Sequence[SequenceSpan], layout: PageLayout) -> npt.NDArray[np.int32]:
        """A step as one buffer that `layout` reads; where it has room to spare stand tokens of nobody.

        Raises ValueError for more than the layout has room for.
        """
        nobody = self.num_blocks * self.block_tokens
        place_T = np.full(layout.tokens, nobody, dtype=np.int64)
        block_NB = np.zeros((layout.sequences, layout.blocks), dtype=np.int32)
        single_JS = np.zeros((layout.singles, _TILE_WORDS), dtype=np.int32)
        tile_JS = np.zeros((layout.tiles, _TILE_WORDS), dtype=np.int32)
        token = single = tile = 0
        for number, span in enumerate(spans):
            used = np.array(span.blocks[: self._blocks_for(span.num_total)], dtype=np.int32)
            block_NB[number, : len(used)] = used
            position = np.arange(span.num_cached, span.num_total)
            block, within = np.divmod(position, self.block_tokens)
            place_T[token : token + span.num_new] = used[block] * self.block_tokens + within
            if span.num_new == 1:
                single_JS[single] = token, 1, span.num_cached, number
                single += 1
            else:
                at_once = self._tile_tokens or span.num_new
                for start in range(0, span.num_new, at_once):
                    size = min(at_once, span.num_new - start)
                    tile_JS[tile] = token + start, size, span.num_cached + start, number
                    tile += 1
            token += span.num_new
        parts = (place_T.view(np.int32), block_NB, single_JS, tile_JS)
        return np.concatenate(
            [np.pad(part.reshape(-1), (0, _aligned(part.size) - part.size)) for part in parts]
        )

    def _tiles_of(self, span: SequenceSpan) -> int:
        return 0 if span.num_new == 1 else -(-span.num_new // (self._tile_tokens or span.num_new))
