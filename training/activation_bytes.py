"""What a forward keeps for its backward, by how long the runs of its adapters are. Numbers only.

A token keeps more in row mode, or where add rows are gathered, than in a long run, which is computed otherwise; and a
long run keeps a copy of its rows. So a stream is long runs, and what each run may keep beyond that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise

import torch

from training.row_room import RowLayouts
from workers.bank.layout import ModuleLayout
from workers.row_form.cost import CostModel, training_cost

_BEYOND = 64
_LONGEST = 1 << 16  # no mode begins later


@dataclass(frozen=True, slots=True)
class RunBytes:
    """What one run of an adapter keeps: (tokens, bytes) for some lengths, ascending, with straight lines between.

    The first line begins at nothing; the last goes on for ever.
    """

    points: tuple[tuple[int, int], ...]

    @property
    def per_token(self) -> float:
        """Of each further token of a long run."""
        (few, before), (many, after) = ((0, 0), *self.points)[-2:]
        return (after - before) / (many - few)

    def of(self, num_tokens: int) -> float:
        """Bytes of a run of so many tokens."""
        lines = list(pairwise(((0, 0), *self.points)))
        (few, before), (many, after) = next(
            (line for line in lines if num_tokens <= line[1][0]), lines[-1]
        )
        return before + (num_tokens - few) * (after - before) / (many - few)

    def corners(self, fewest: int, most: int) -> set[int]:
        """Lengths in that range, among them those at which a run keeps the most and the most for a token."""
        return {fewest, most, *(length for length, _ in self.points if fewest <= length <= most)}


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """What a stream of tokens keeps from its forward to its backward, logits apart."""

    per_token: int
    """In all decoder layers, in a long run."""
    of_a_run: Mapping[str, int]
    """By adapter: what a run of its own keeps beyond that, at most."""
    beyond: int
    """What a token keeps beyond it, in the run where that is most."""
    layer_inputs: int
    """Of a token, in all layers."""
    num_layers: int
    rows_of_a_run: Mapping[str, int]
    """By adapter: what is in hand at once where a run is computed row by row."""
    rows_of_a_token: int
    """At most."""
    measuring: int
    """Of the largest forward that measured this; allocators do not give back what it kept."""

    def of(
        self, num_tokens: int, adapters: Collection[str], max_resident: int, *, checkpointed: bool
    ) -> int:
        """Of one forward of so many tokens of any `max_resident` of the adapters, one run each.

        Checkpointed: the inputs of all layers, and everything of the one layer that is being computed again.
        """
        runs = sum(nlargest(max_resident, (self.of_a_run[name] for name in adapters)))
        kept = num_tokens * self.per_token + min(runs, num_tokens * self.beyond)
        if not checkpointed:
            return kept
        return num_tokens * self.layer_inputs + -(-kept // self.num_layers)

    def in_rows(self, num_tokens: int, adapters: Collection[str], max_resident: int) -> int:
        """What the widest product of rows has in hand, of such a forward."""
        runs = sum(nlargest(max_resident, (self.rows_of_a_run[name] for name in adapters)))
        return min(runs, num_tokens * self.rows_of_a_token)


def run_lengths(layouts: RowLayouts, dtype: torch.dtype) -> list[int]:
    """The lengths that tell what any run of such an adapter keeps: the last one and the first of every mode."""
    begins = _later_modes(layouts, dtype)
    ends = {begin - 1 for begin in begins if begin > 1}
    return sorted({1, *begins, *ends, max(begins, default=1) + _BEYOND})


def longest_by_token(layouts: RowLayouts, dtype: torch.dtype) -> int:
    """Runs of up to so many tokens keep what as many runs of one token keep."""
    return min(_later_modes(layouts, dtype), default=_LONGEST) - 1


def _later_modes(layouts: RowLayouts, dtype: torch.dtype) -> set[int]:
    """The tokens from which on some module is not computed token by token any more."""
    cost = training_cost(dtype)
    begins = set()
    for layout in set(layouts.values()):
        begins.add(_first_in_weights(cost, layout))
        if layout.num_add:
            begins.add(cost.thin_product_tokens)
    return begins - {_LONGEST}


def _first_in_weights(cost: CostModel, layout: ModuleLayout) -> int:
    return bisect_left(
        range(_LONGEST),
        True,
        key=lambda length: cost.prefers_weight_mode(length, layout.num_mul, layout.offset),
    )
