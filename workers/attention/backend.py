"""Who owns the KV cache's layout, and computes attention over it.

On CPU each sequence has one contiguous slab (`slabs.py`). What a model needs and a back end lacks (sliding windows,
soft caps) is refused by name, never ignored.

Shape legend: T tokens in the step, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from workers.models.runner import KvCopy, SequenceSpan


class AttentionBackend(Protocol):
    """Causal self-attention of the new tokens of a step over all tokens of their own sequence, and no others."""

    num_slots: int
    max_tokens_per_slot: int

    def begin_step(
        self,
        spans: Sequence[SequenceSpan],
        saves: Sequence[KvCopy] = (),
        restores: Sequence[KvCopy] = (),
    ) -> None:
        """Called once before a forward; prepares what all layers share. The spans stay in force until the next call.

        Args:
            saves, restores: `StepInput.kv_saves` and `kv_restores`, carried out in this order before all else;
                nothing to do for a back end whose blocks are pages.
        """

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Write the new keys and values of `layer` to the cache, return the attention output_THD."""
