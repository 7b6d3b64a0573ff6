"""Which adapter every token of one step uses, with which weight.

A `StepPlan` knows nothing of ranks, modules, families, requests or schedulers: bank rows are looked up per module
group, because an adapter may have another rank, or no rows at all, in each module.

Shape legend: T tokens in the step, P (token, adapter) parts in the step, S bank slots.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class NotResidentError(LookupError):
    """A token names an adapter whose rows are not in the bank."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens that share one set of adapters. No parts: the base model."""

    num_tokens: int
    parts: tuple[tuple[int, float], ...] = ()  # (bank slot, gate)


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Consecutive tokens of one adapter, by position in the step."""

    start: int
    num_tokens: int
    slot: int
    gate: float = 1.0


@dataclass(frozen=True, slots=True)
class Parts:
    """One entry per (token, adapter), in token order, so a segment sum over parts is a sum over tokens."""

    token_P: Tensor  # int64
    slot_P: Tensor  # int64
    gate_P: Tensor  # float32; weighs add rows


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Valid for one step; its tensors live on the model's device and are written once, before the forward."""

    runs: tuple[SlotRun, ...]  # ascending, one entry per segment with an adapter
    parts: Parts  # the same, expanded to tokens
    num_tokens: int
    device: torch.device

    @property
    def is_base_only(self) -> bool:
        """No token names an adapter. (An adapter with no rows in a module is not base-only: it may scale outputs.)"""
        return not self.runs


def expand_runs(runs: Sequence[SlotRun], device: torch.device) -> Parts:
    """Runs to tokens, without a host sync on `device`."""
    num_parts = sum(run.num_tokens for run in runs)
    count = torch.tensor([run.num_tokens for run in runs], dtype=torch.int64)
    start = torch.tensor([run.start for run in runs], dtype=torch.int64)
    slot = torch.tensor([run.slot for run in runs], dtype=torch.int64)
    gate = torch.tensor([run.gate for run in runs], dtype=torch.float32)
    which = torch.repeat_interleave(torch.arange(len(runs)), count, output_size=num_parts)
    within = torch.arange(num_parts) - (count.cumsum(0) - count)[which]
    return Parts(
        token_P=(start[which] + within).to(device, non_blocking=True),
        slot_P=slot[which].to(device, non_blocking=True),
        gate_P=gate[which].to(device, non_blocking=True),
    )


def plan_step(
    segments: Sequence[Segment], resident: Container[int], device: torch.device
) -> StepPlan:
    """Plan one step in host time proportional to the number of segments, not of tokens.

    Raises:
        NotResidentError: a segment names a slot that is not resident. The step must not run: answering from the base
            model instead would be a wrong answer that looks right.
        ValueError: a segment names more than one adapter, which no family needs yet.
    """
    runs: list[SlotRun] = []
    token = 0
    for segment in segments:
        if len(segment.parts) > 1:
            raise ValueError("a segment may name one adapter")
        for slot, gate in segment.parts:
            if slot not in resident:
                raise NotResidentError(f"adapter slot {slot} is not resident")
            if segment.num_tokens:
                runs.append(SlotRun(token, segment.num_tokens, slot, gate))
        token += segment.num_tokens
    return StepPlan(tuple(runs), expand_runs(runs, device), token, device)
