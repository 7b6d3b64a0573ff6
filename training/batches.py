"""Put sequences of many adapters into one token stream, planned as a serving step is.

Shape legend: T tokens of the stream, L completion positions.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.packed_attention import PackedAttention
from training.tokens import TokenSequence
from workers.row_form.step_plan import Segment, StepPlan, plan_step

MAX_PADDING = 2


@dataclass(frozen=True, slots=True)
class OwnedSequence:
    """A sequence with the number and bank slot of the adapter it is for."""

    adapter: int
    slot: int
    sequence: TokenSequence

    @property
    def num_inputs(self) -> int:
        """The last token is only ever a target."""
        return len(self.sequence.tokens) - 1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward. Position `predict_from_L` of the stream predicts `target_L`, for adapter number `adapter_L`."""

    tokens_T: Tensor
    positions_T: Tensor
    predict_from_L: Tensor
    target_L: Tensor
    adapter_L: Tensor
    attention: PackedAttention
    plan: StepPlan


def pack(
    owned: Sequence[OwnedSequence], resident: Container[int], device: torch.device
) -> PackedBatch:
    """Sequences one after another; those of one adapter should stand together, so that they are one run of the plan."""
    tokens: list[int] = []
    positions: list[int] = []
    predict_from: list[int] = []
    target: list[int] = []
    adapter: list[int] = []
    runs: list[tuple[int, int]] = []  # (slot, tokens)
    for one in owned:
        start, ids = len(tokens), one.sequence.tokens
        count = one.num_inputs
        for index, is_learnt in enumerate(one.sequence.learnt):
            if is_learnt:
                predict_from.append(start + index - 1)
                target.append(ids[index])
                adapter.append(one.adapter)
        tokens.extend(ids[:count])
        positions.extend(range(count))
        before = runs.pop()[1] if runs and runs[-1][0] == one.slot else 0
        runs.append((one.slot, before + count))
    segments = [Segment(count, ((slot, 1.0),)) for slot, count in runs]
    return PackedBatch(
        tokens_T=torch.tensor(tokens, device=device),
        positions_T=torch.tensor(positions, device=device),
        predict_from_L=torch.tensor(predict_from, device=device),
        target_L=torch.tensor(target, device=device),
        adapter_L=torch.tensor(adapter, device=device),
        attention=PackedAttention([one.num_inputs for one in owned], device),
        plan=plan_step(segments, resident, device),
    )


def split(owned: Sequence[OwnedSequence], max_tokens: int) -> Iterator[Sequence[OwnedSequence]]:
    """Parts of at most `max_tokens` tokens (a longer sequence is a part of its own), in order.

    Attention pads a part's sequences to its longest, so that many short ones beside a long one would take many times
    their memory: a part has at most `MAX_PADDING` positions for each of `max_tokens`.
    """
    part: list[OwnedSequence] = []
    count = longest = 0
    for one in owned:
        longer = max(longest, one.num_inputs)
        if part and (
            count + one.num_inputs > max_tokens
            or (len(part) + 1) * longer > MAX_PADDING * max_tokens
        ):
            yield part
            part, count, longer = [], 0, one.num_inputs
        part.append(one)
        count += one.num_inputs
        longest = longer
    if part:
        yield part
