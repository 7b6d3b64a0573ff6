"""Attention over sequences that stand one after another in one token stream: none sees another, none is padded outside.

Only attention itself needs a rectangle; every other layer runs on the real tokens alone.

Shape legend: T tokens, B sequences, L the longest, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class PackedAttention:
    """The attention of one step, for transformers models that `adopt_attention` switched over; has no cache."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.max_tokens_per_slot = max(
            lengths
        )  # a sliding window at least this wide cuts nothing off
        self._shape = (len(lengths), self.max_tokens_per_slot)
        self._is_full = min(lengths) == max(lengths)  # nothing to pad
        self._place_T = torch.cat(
            [torch.arange(n) + row * self._shape[1] for row, n in enumerate(lengths)]
        ).to(device)

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        """Causal self-attention of each sequence. Padding is on the right, where causality hides it."""
        out_BHLD = functional.scaled_dot_product_attention(
            self._rectangle(query_THD),
            self._rectangle(key_TKD),
            self._rectangle(value_TKD),
            is_causal=True,
            scale=scale,
            enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
        )
        out_THD = out_BHLD.transpose(1, 2).flatten(0, 1)
        if not self._is_full:
            out_THD = out_THD.index_select(0, self._place_T)
        return out_THD.to(query_THD.dtype)

    def _rectangle(self, x_THD: Tensor) -> Tensor:
        rows, longest = self._shape
        # torch's backward on CPU takes twice as long in bfloat16 (measured: 2.1 times at 128 tokens, 0.9 at 512).
        if x_THD.dtype == torch.bfloat16 and x_THD.device.type == "cpu":
            x_THD = x_THD.float()
        if self._is_full:
            return x_THD.view(rows, longest, *x_THD.shape[1:]).transpose(1, 2)
        padded = x_THD.new_zeros(rows * longest, *x_THD.shape[1:])
        padded = padded.index_copy(0, self._place_T, x_THD)
        return padded.view(rows, longest, *x_THD.shape[1:]).transpose(1, 2)
