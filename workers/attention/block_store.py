"""Full blocks of keys and values beside the slabs of running sequences, by block id: what the prefix cache keeps.

Shape legend: B blocks copied, S slots, K key/value heads, C chunks of one block in a slot, N tokens of a block,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.lazy_memory import lazy_zeros
from workers.models.runner import KvCopy


class BlockStore:
    """Copies blocks out of slabs and back.

    Args:
        slabs_SKMD: all the slabs, keys and values of every layer; M is a multiple of `block_tokens`.
        num_blocks: ids are below it. Memory is reserved for all, and on CPU spent on those that were saved.
    """

    def __init__(self, slabs_SKMD: Sequence[Tensor], num_blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (slab by block, store)
        for slab_SKMD in slabs_SKMD:
            num_slots, num_kv_heads, _, head_dim = slab_SKMD.shape
            slab_SKCND = slab_SKMD.view(num_slots, num_kv_heads, -1, block_tokens, head_dim)
            shape = (num_blocks, num_kv_heads, block_tokens, head_dim)
            store_BKND = lazy_zeros(shape, slab_SKMD.dtype, slab_SKMD.device)
            self._pairs.append((slab_SKCND, store_BKND))

    def save(self, copies: Sequence[KvCopy]) -> None:
        """Slot → block."""
        if copies:
            block_B, slot_B, chunk_B = self._index(copies)
            for slab_SKCND, store_BKND in self._pairs:
                store_BKND[block_B] = slab_SKCND[slot_B, :, chunk_B]

    def restore(self, copies: Sequence[KvCopy]) -> None:
        """Block → slot."""
        if copies:
            block_B, slot_B, chunk_B = self._index(copies)
            for slab_SKCND, store_BKND in self._pairs:
                slab_SKCND[slot_B, :, chunk_B] = store_BKND[block_B]

    def _index(self, copies: Sequence[KvCopy]) -> tuple[Tensor, Tensor, Tensor]:
        device = self._pairs[0][0].device
        rows = [(one.block, one.kv_slot, one.start // self._block_tokens) for one in copies]
        block_B, slot_B, chunk_B = torch.tensor(rows, dtype=torch.int64).T.to(device)
        return block_B, slot_B, chunk_B
