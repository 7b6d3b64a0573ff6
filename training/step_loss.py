"""The loss of each adapter in one pass over sequences of many. Knows nothing of schedules, ends or who comes next.

Shape legend: L completion positions, S adapters, H hidden size, T tokens of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from training.batches import OwnedSequence, PackedBatch, pack, split
from training.completion_loss import completion_nll
from training.frozen_base import FrozenBase
from training.trainable_rows import TrainableRows

Batch = Mapping[int, Sequence[OwnedSequence]]
"""Sequences by the number of their adapter, each of which has a place."""


class StepLoss:
    """Means over each adapter's own completion tokens, through one base and the rows that have a place.

    Args:
        num_adapters: S: numbers go from 0 to S − 1, whoever has a place.
        max_step_tokens: longest forward; a batch with more tokens runs in several, with the same sums.
        dtype: of sums: float32, or wider.
    """

    def __init__(
        self,
        base: FrozenBase,
        rows: TrainableRows,
        *,
        num_adapters: int,
        max_step_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self._base = base
        self._rows = rows
        self._num_adapters = num_adapters
        self._max_step_tokens = max_step_tokens
        self._dtype = dtype

    def backward(self, batch: Batch) -> Tensor:
        """Add to the gradients what the batch asks for; returns loss_S, 0 for those without tokens."""
        count_S = self._learnt_tokens(batch)
        flat = [one for owned in batch.values() for one in owned]
        loss_S = torch.zeros_like(count_S)
        for part in split(flat, self._max_step_tokens):
            part_S = self.summed_nll(part) / count_S
            part_S.sum().backward()  # type: ignore[no-untyped-call]
            loss_S += part_S.detach()
        return loss_S

    @torch.no_grad()
    def held_out(self, batch: Batch, sizes: Mapping[int, int]) -> Tensor:
        """loss_S without gradients; at most `sizes` sequences of each adapter go through the base at a time."""
        chunks = [
            [owned[start : start + sizes[number]] for start in range(0, len(owned), sizes[number])]
            for number, owned in batch.items()
        ]
        count_S = self._learnt_tokens(batch)
        total_S = torch.zeros_like(count_S)
        for mixed in zip_longest(*chunks, fillvalue=()):
            for part in split([one for chunk in mixed for one in chunk], self._max_step_tokens):
                total_S += self.summed_nll(part)
        return total_S / count_S

    def summed_nll(self, owned: Sequence[OwnedSequence]) -> Tensor:
        """nll_S of one forward, summed over each adapter's own completion tokens."""
        packed = pack(owned, self._rows.bank.resident_slots, self._base.device)
        nll_L = self._nll(packed)
        return nll_L.new_zeros(self._num_adapters).index_add(0, packed.adapter_L, nll_L)

    def _nll(self, packed: PackedBatch) -> Tensor:
        self._base.layers.begin_step(packed.plan)
        hidden_TH = self._base.hidden_states(packed.tokens_T, packed.positions_T, packed.attention)
        return completion_nll(
            hidden_TH.index_select(0, packed.predict_from_L), packed.target_L, self._base.head
        )

    def _learnt_tokens(self, batch: Batch) -> Tensor:
        """count_S; 1 for those without tokens, whose sum is 0."""
        counts = [1.0] * self._num_adapters
        for number, owned in batch.items():
            counts[number] = float(sum(one.sequence.num_learnt for one in owned))
        return torch.tensor(counts, dtype=self._dtype, device=self._base.device)
