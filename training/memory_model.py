"""What a training step takes at most, in bytes, and what fits a budget. Numbers only: it looks at no machine.

Counted: the process before it loads anything, the frozen base, rows with gradient and AdamW's two moments, what an
update of them makes on the way, what a forward keeps for its backward, the logits of one chunk, and the scratch of
weight mode, and something to spare. `benchmarks/training_memory.py` holds the sum to what real steps take.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from storage.errors import SpecificationError
from training.activation_bytes import ActivationBytes, RunBytes
from training.completion_loss import CHUNK_POSITIONS
from training.kept_bytes import estimated_run, row_bytes
from training.row_room import RowLayouts, RowRoom
from workers.row_form.weight_product import scratch_bound

PROCESS_BYTES = 640 << 20
"""Python with torch and transformers, and what they hold once they compute; a GPU's context takes about as much."""
FULL_STEP_TOKENS = 2048
"""From here on a larger forward hardly makes a token cheaper, so memory goes to more adapters first."""
BACKWARD = 1.4
"""What activations take at the peak, over what a forward keeps: their gradients on the way. Fitted, with SLACK, to the
peaks of a few small jobs (`benchmarks/training_memory.py`)."""
SLACK = 0.3
"""Of what comes and goes: what an allocator cannot use, attention's padding, and what modes side by side make twice."""
_OF_A_ROW = 4  # weight, gradient, two moments
_OF_AN_UPDATE = 6  # tensors of the largest width's rows that exist at once
_OF_LOGITS = 3  # beside those in the base's type: their logarithms, and a gradient of each


@dataclass(frozen=True)
class BaseShape:
    """A base model as training holds it: `parameters` numbers of a type, projections of path → (in, out)."""

    parameters: int
    dtype: torch.dtype
    projections: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    num_layers: int
    hidden: int
    vocabulary: int
    can_checkpoint: bool  # the model says which of its modules are its layers


@dataclass(frozen=True)
class AdapterNeeds:
    """One adapter: its rows, the tokens of its longest sequence, and of its shortest, ordinary and longest steps."""

    name: str
    layouts: RowLayouts
    longest_tokens: int
    fewest_tokens: int
    step_tokens: int
    most_tokens: int


@dataclass(frozen=True, slots=True)
class StepBytes:
    """One step's memory, by what it is for."""

    process: int
    base: int
    rows: int
    activations: int
    logits: int
    scratch: int

    @property
    def slack(self) -> int:
        return round(SLACK * (self.rows + self.activations + self.logits + self.scratch))

    @property
    def total(self) -> int:
        step = self.rows + self.activations + self.logits + self.scratch + self.slack
        return self.process + self.base + step

    def __str__(self) -> str:
        parts = (
            f"{_mebibytes(self.process)} for the process",
            f"{_mebibytes(self.base)} for the base",
            f"{_mebibytes(self.rows)} for rows and their moments",
            f"{_mebibytes(self.activations)} for activations",
            f"{_mebibytes(self.logits)} for logits",
            f"{_mebibytes(self.scratch)} for scratch",
            f"{_mebibytes(self.slack)} to spare",
        )
        return f"{_mebibytes(self.total)}: " + ", ".join(parts)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How a trainer shall go about it, and what that takes."""

    max_resident: int
    max_step_tokens: int
    checkpoint_activations: bool
    needs: StepBytes = field(repr=False)


def estimated_runs(base: BaseShape, adapters: Sequence[AdapterNeeds]) -> dict[str, RunBytes]:
    """By adapter, before there is a model to measure them on."""
    return {one.name: estimated_run(base.projections, one.layouts, base.dtype) for one in adapters}


def activation_bytes(
    base: BaseShape, adapters: Sequence[AdapterNeeds], runs: Mapping[str, RunBytes]
) -> ActivationBytes:
    """What streams of these adapters keep, each with one run as long as a step of its own."""
    per_token = math.ceil(max(runs[one.name].per_token for one in adapters))
    of_a_run, rows_of_a_run = {}, {}
    beyond = rows_of_a_token = 0.0
    for one in adapters:
        run = runs[one.name]
        lengths = run.corners(one.fewest_tokens, one.most_tokens)
        rows = {n: row_bytes(base.projections, one.layouts, n, base.dtype) for n in lengths}
        rows_of_a_run[one.name] = max(rows.values())
        rows_of_a_token = max(rows_of_a_token, *(of_all / n for n, of_all in rows.items()))
        of_a_run[one.name] = math.ceil(max(0.0, *(run.of(n) - n * per_token for n in lengths)))
        beyond = max(beyond, *(run.of(n) / n - per_token for n in lengths))
    return ActivationBytes(
        per_token=per_token,
        of_a_run=of_a_run,
        beyond=math.ceil(beyond),
        layer_inputs=base.num_layers * base.hidden * base.dtype.itemsize,
        num_layers=base.num_layers,
        rows_of_a_run=rows_of_a_run,
        rows_of_a_token=math.ceil(rows_of_a_token),
        measuring=max(runs[one.name].points[-1][1] for one in adapters),
    )


def step_bytes(
    base: BaseShape,
    adapters: Sequence[AdapterNeeds],
    kept: ActivationBytes,
    *,
    max_resident: int,
    step_tokens: int,
    checkpoint: bool,
) -> StepBytes:
    """Of a forward and backward over `step_tokens` tokens of any `max_resident` of the adapters."""
    wide = torch.promote_types(base.dtype, torch.float32)
    room = RowRoom.of([one.layouts for one in adapters], base.projections, max_resident)
    numbers = room.numbers(base.projections).values()
    names = [one.name for one in adapters]
    activations = kept.of(step_tokens, names, max_resident, checkpointed=checkpoint)
    in_rows = kept.in_rows(step_tokens, names, max_resident)
    chunk = min(CHUNK_POSITIONS, step_tokens) * base.vocabulary
    return StepBytes(
        process=PROCESS_BYTES,
        base=base.parameters * base.dtype.itemsize,
        rows=(_OF_A_ROW * sum(numbers) + _OF_AN_UPDATE * max(numbers)) * wide.itemsize,
        activations=max(round(BACKWARD * activations), kept.measuring),
        logits=chunk * (base.dtype.itemsize + _OF_LOGITS * wide.itemsize),
        # M, its gradient's, W0 beside them; or the rows of one projection.
        scratch=max(3 * scratch_bound(base.projections, 1, wide), in_rows),
    )


def plan_steps(
    base: BaseShape,
    adapters: Sequence[AdapterNeeds],
    kept: ActivationBytes,
    *,
    budget: int,
    max_step_tokens: int,
    checkpoint: bool | None,
) -> StepLimits:
    """The limits under which all these adapters train in `budget` bytes.

    Room goes first to a forward long enough to be efficient, then to adapters, then to longer forwards. Activations
    are checkpointed (None: if need be) only where without it the adapters that fit would not fill a forward.

    Raises:
        SpecificationError: one adapter does not fit even alone; says which, what it takes and what to change.
    """
    longest = max(one.longest_tokens for one in adapters)
    most = max(longest, min(max_step_tokens, sum(one.most_tokens for one in adapters)))
    full = max(longest, min(most, FULL_STEP_TOKENS))
    choices = (False, True) if checkpoint is None else (checkpoint,)

    def needs(residents: int, tokens: int, checkpointed: bool) -> StepBytes:
        return step_bytes(
            base,
            adapters,
            kept,
            max_resident=residents,
            step_tokens=tokens,
            checkpoint=checkpointed,
        )

    def fits(residents: int, tokens: int, checkpointed: bool) -> bool:
        return needs(residents, tokens, checkpointed).total <= budget

    def most_residents(tokens: int, checkpointed: bool) -> int:
        return _largest(len(adapters), lambda n: fits(n, tokens, checkpointed))

    def most_tokens(residents: int, fewest: int, checkpointed: bool) -> int:
        return max(fewest, _largest(most, lambda n: fits(residents, max(n, fewest), checkpointed)))

    enough = _fewest_to_fill(adapters, full)
    tries = [(full, choice, 1 if choice is choices[-1] else enough) for choice in choices]
    tries += [(longest, choice, 1) for choice in choices]
    for tokens, checkpointed, fewest in tries:
        residents = most_residents(tokens, checkpointed)
        if residents >= fewest:
            longer = most_tokens(residents, tokens, checkpointed)
            return StepLimits(
                residents, longer, checkpointed, needs(residents, longer, checkpointed)
            )
    raise _refused(base, adapters, kept, budget, needs(1, longest, choices[-1]), choices[-1])


def _alone(
    base: BaseShape, adapter: AdapterNeeds, kept: ActivationBytes, checkpointed: bool
) -> StepBytes:
    return step_bytes(
        base,
        [adapter],
        kept,
        max_resident=1,
        step_tokens=adapter.longest_tokens,
        checkpoint=checkpointed,
    )


def _fewest_to_fill(adapters: Sequence[AdapterNeeds], tokens: int) -> int:
    """How many adapters it takes, the smallest batches first, to have that many tokens in a step; all at most."""
    count = total = 0
    for step_tokens in sorted(one.step_tokens for one in adapters):
        if total >= tokens:
            break
        total += step_tokens
        count += 1
    return count


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` that `holds`, which every smaller one does too; 0 if not even 1."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _refused(
    base: BaseShape,
    adapters: Sequence[AdapterNeeds],
    kept: ActivationBytes,
    budget: int,
    together: StepBytes,
    checkpointed: bool,
) -> SpecificationError:
    worst, needs = max(
        ((one, _alone(base, one, kept, checkpointed)) for one in adapters),
        key=lambda pair: pair[1].total,
    )
    if needs.total > budget:
        what = (
            f"{worst.name}: does not fit in memory even alone: a step of one sequence of "
            f"{worst.longest_tokens} tokens takes {needs}"
        )
    else:
        what = (
            f"{worst.name}: fits in memory alone, but not in one job with adapters of more rows or longer sequences: "
            f"one at a time they take {together}"
        )
    return SpecificationError(
        f"{what}; the budget is {_mebibytes(budget)}. A shorter sequence_length, a lower rank, fewer target_modules, "
        "dtype bfloat16 or a smaller base takes less; training.memory_bytes sets the budget",
        param="training.memory_bytes",
    )


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
