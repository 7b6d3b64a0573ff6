"""What the model and the sampler are told of a step the scheduler decided on."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Ordered

import torch

from workers.engine.sampling.row import SamplingRow
from workers.engine.sequence import Sequence
from workers.engine.step_budget import ScheduledSpan
from workers.models.runner import KvCopy, SequenceSpan, StepInput
from workers.row_form.step_plan import Segment, plan_step


def build_step_input(
    spans: Ordered[ScheduledSpan],
    resident_slots: Container[int],
    device: torch.device,
    saves: tuple[KvCopy, ...] = (),
    restores: tuple[KvCopy, ...] = (),
) -> StepInput:
    """The spans' tokens in one stream, in order. Raises NotResidentError if an adapter's rows are gone.

    Logits are wanted first of the tokens that are answered, then of those that score a prompt, both in spans' order.

    Args:
        saves, restores: KV blocks to copy before the forward.
    """
    tokens: list[int] = []
    positions: list[int] = []
    answered: list[int] = []
    scoring: list[int] = []
    segments: list[Segment] = []
    for span in spans:
        one = span.sequence
        tokens += one.pending(span.num_new)
        positions += range(one.num_computed, one.num_computed + span.num_new)
        segments.append(Segment(span.num_new, _parts(one)))
        if span.wants_logits:
            answered.append(len(tokens) - 1)
        start = len(tokens) - span.num_new - one.num_computed
        scoring += (start + position for position in one.scoring_positions(span.num_new))
    return StepInput(
        token_ids_T=torch.tensor(tokens, device=device),
        positions_T=torch.tensor(positions, device=device),
        spans=tuple(_sequence_span(span) for span in spans),
        plan=plan_step(segments, resident_slots, device),
        logits_of_L=torch.tensor(answered + scoring, dtype=torch.int64, device=device),
        kv_saves=saves,
        kv_restores=restores,
    )


def sampling_row(sequence: Sequence, eos_token_ids: frozenset[int]) -> SamplingRow:
    """How the sequence's next token is chosen."""
    params = sequence.request.sampling
    is_early = len(sequence.answer) < params.min_tokens
    return SamplingRow(
        params,
        position=sequence.num_tokens,
        forbidden=sequence.stop_token_ids(eos_token_ids) if is_early else frozenset(),
        prompt=sequence.request.prompt_token_ids,
        answer=sequence.answer,
    )


def _parts(sequence: Sequence) -> tuple[tuple[int, float], ...]:
    if sequence.version is None:
        return ()
    if sequence.bank_slot is None:
        raise ValueError(f"request {sequence.request.request_id} runs without its adapter")
    return ((sequence.bank_slot, 1.0),)


def _sequence_span(span: ScheduledSpan) -> SequenceSpan:
    sequence = span.sequence
    if sequence.kv_slot is None:
        raise ValueError(f"request {sequence.request.request_id} runs without a KV slot")
    return SequenceSpan(
        sequence.kv_slot, sequence.num_computed, span.num_new, tuple(sequence.blocks)
    )
