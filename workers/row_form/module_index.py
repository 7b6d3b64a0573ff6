"""One step's plan, looked up in one module group: which bank rows meet which tokens, and in which mode.

Built once per group and step, used by every module of the group.

Shape legend: T tokens, P (token, adapter) parts, R rows in the step (one per token and bank row), B tokens that need
the base product, A runs of a batch with L tokens and K bank rows each, S bank slots.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from workers.bank.groups import GroupTable, PageLists
from workers.bank.pages import NULL_PAGE
from workers.row_form.cost import CostModel
from workers.row_form.page_rows import PageRows
from workers.row_form.step_plan import Parts, SlotRun, StepPlan, expand_runs


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Gathered rows, token by token."""

    first_T1: Tensor  # token t has rows first[t] to first[t + 1]
    token_R: Tensor
    in_page_R: Tensor
    out_page_R: Tensor
    gate_R: Tensor  # float32
    _by_page: dict[tuple[str, int], PageRows] = field(default_factory=dict, init=False, repr=False)

    def by_page(self, side: Literal["in", "out"], num_pages: int) -> PageRows:
        """The rows of every page of one side; made when first asked for, then shared by all modules of the group."""
        key = (side, num_pages)
        if key not in self._by_page:
            page_R = self.in_page_R if side == "in" else self.out_page_R
            self._by_page[key] = PageRows.of(page_R, num_pages)
        return self._by_page[key]


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Runs of equal length and equal number of rows, computed by one batched product."""

    token_AL: Tensor
    in_page_AK: Tensor
    out_page_AK: Tensor
    gate_A: Tensor  # float32; add rows
    shift_A: Tensor  # float32; mul rows: what is added to Σ a_j b_jᵀ


@dataclass(frozen=True, slots=True)
class ModuleIndex:
    """Everything the modules of one group need to run this step. None: nothing of the kind in this step."""

    num_tokens: int
    base_token_B: Tensor | None  # None: every token
    base_row_T: Tensor | None  # the same the other way round: a token's place in B, or -1
    mul: RowIndex | None
    add: RowIndex | None
    mul_batches: tuple[RunBatch, ...]
    add_batches: tuple[RunBatch, ...]
    delta_row_T: Tensor | None  # a token's place among all tokens of `mul_batches`, or -1
    scale_page_T: Tensor | None  # of c − 1
    bias_page_T: Tensor | None  # of bias' − bias

    @property
    def num_base_tokens(self) -> int:
        """B."""
        return self.num_tokens if self.base_token_B is None else self.base_token_B.shape[0]

    @property
    def has_mul_rows(self) -> bool:
        """Some tokens' outputs are other products with W0 than the base's."""
        return bool(self.base_token_B is not None or self.mul is not None or self.mul_batches)

    @property
    def has_rows_only(self) -> bool:
        """Base rows and mul rows in row mode make the outputs; nothing is added to them or scales them."""
        return not (
            self.add is not None
            or self.mul_batches
            or self.add_batches
            or self.scale_page_T is not None
            or self.bias_page_T is not None
        )

    @property
    def is_plain(self) -> bool:
        """Nothing to do beyond the base layer: no adapter in this step touches these modules."""
        return (
            self.base_token_B is None
            and self.mul is None
            and self.add is None
            and not self.mul_batches
            and not self.add_batches
            and self.scale_page_T is None
            and self.bias_page_T is None
        )


def index_module_group(plan: StepPlan, table: GroupTable, cost: CostModel) -> ModuleIndex:
    """Look a plan up in a group. Host time grows with runs, not tokens; no host sync."""
    layouts = {run.slot: table.pages[run.slot].layout for run in plan.runs}
    as_weights = {
        run: None
        for run in plan.runs
        if cost.prefers_weight_mode(
            run.num_tokens, layouts[run.slot].num_mul, layouts[run.slot].offset
        )
    }
    as_thin = {
        run: None
        for run in plan.runs
        if cost.prefers_thin_product(run.num_tokens, layouts[run.slot].num_add)
    }
    # Delta form beside the base product runs an offset of 0 as 1 with Σ − 1.
    delta = not cost.merged
    needs_no_base = [
        run
        for run in plan.runs
        if (cost.merged if run in as_weights else layouts[run.slot].offset == 0)
    ]
    base_token_B = _other_tokens(plan, needs_no_base)
    mul_batches = _batches(
        as_weights,
        plan.device,
        pages=lambda slot: (table.pages[slot].mul_in, table.pages[slot].mul_out),
        shift=lambda slot: float(layouts[slot].offset - delta),
        gate=lambda slot: 1.0,
    )
    return ModuleIndex(
        num_tokens=plan.num_tokens,
        base_token_B=base_token_B,
        base_row_T=None if base_token_B is None else _places(base_token_B, plan),
        mul=_rows(plan, table.mul, as_weights, None),
        add=_rows(plan, table.add, as_thin, table.add_gate_S),
        mul_batches=mul_batches,
        delta_row_T=_places(torch.cat([one.token_AL.flatten() for one in mul_batches]), plan)
        if mul_batches
        else None,
        add_batches=_batches(
            as_thin,
            plan.device,
            pages=lambda slot: (table.pages[slot].add_in, table.pages[slot].add_out),
            shift=lambda slot: 0.0,
            gate=lambda slot: layouts[slot].add_gate,
        ),
        scale_page_T=_page_of_token(
            plan, table.scale_page_S, any(layout.has_scale for layout in layouts.values())
        ),
        bias_page_T=_page_of_token(
            plan, table.bias_page_S, any(layout.has_bias for layout in layouts.values())
        ),
    )


def _other_tokens(plan: StepPlan, runs: Sequence[SlotRun]) -> Tensor | None:
    """The tokens outside `runs`, ascending; None when `runs` is empty."""
    if not runs:
        return None
    edges = [0]
    for run in runs:
        edges += [run.start, run.start + run.num_tokens]
    edges.append(plan.num_tokens)
    spans = [torch.arange(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return torch.cat(spans).to(plan.device, non_blocking=True)


def _places(tokens: Tensor, plan: StepPlan) -> Tensor:
    """Where each token of the step stands in `tokens`; -1 for one that does not."""
    place_T = torch.full((plan.num_tokens,), -1, dtype=torch.int64, device=plan.device)
    place_T[tokens] = torch.arange(tokens.shape[0], device=plan.device)
    return place_T


def _rows(
    plan: StepPlan, lists: PageLists, elsewhere: Container[SlotRun], gate_S: Tensor | None
) -> RowIndex | None:
    """One entry per (token, bank row) of the runs that are not computed `elsewhere`."""
    runs = [run for run in plan.runs if run.slot in lists.counts and run not in elsewhere]
    num_rows = sum(run.num_tokens * lists.counts[run.slot] for run in runs)
    if num_rows == 0:
        return None
    parts: Parts = plan.parts if len(runs) == len(plan.runs) else expand_runs(runs, plan.device)
    count_P = lists.count_S[parts.slot_P]
    part_R = torch.repeat_interleave(count_P, output_size=num_rows)
    start_P = count_P.cumsum(0) - count_P
    within_R = torch.arange(num_rows, device=plan.device) - start_P[part_R]
    page_R = lists.first_S[parts.slot_P][part_R] + within_R
    first_T1 = torch.zeros(plan.num_tokens + 1, dtype=torch.int64, device=plan.device)
    first_T1[parts.token_P + 1] = count_P
    gate_P = parts.gate_P if gate_S is None else parts.gate_P * gate_S[parts.slot_P]
    return RowIndex(
        first_T1=first_T1.cumsum(0),
        token_R=parts.token_P[part_R],
        in_page_R=lists.in_page_F[page_R],
        out_page_R=lists.out_page_F[page_R],
        gate_R=gate_P[part_R],
    )


def _batches(
    runs: Iterable[SlotRun],
    device: torch.device,
    *,
    pages: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]],
    shift: Callable[[int], float],
    gate: Callable[[int], float],
) -> tuple[RunBatch, ...]:
    """Batch runs of equal length and rank; nothing is padded to the longest or the highest."""
    alike: dict[tuple[int, int], list[SlotRun]] = {}
    for run in runs:
        alike.setdefault((run.num_tokens, len(pages(run.slot)[0])), []).append(run)
    batches = []
    for (num_tokens, _), members in alike.items():
        start_A = torch.tensor([run.start for run in members])
        batches.append(
            RunBatch(
                token_AL=(start_A[:, None] + torch.arange(num_tokens)).to(device),
                in_page_AK=torch.tensor([pages(run.slot)[0] for run in members], device=device),
                out_page_AK=torch.tensor([pages(run.slot)[1] for run in members], device=device),
                gate_A=torch.tensor([run.gate * gate(run.slot) for run in members], device=device),
                shift_A=torch.tensor([shift(run.slot) for run in members], device=device),
            )
        )
    return tuple(batches)


def _page_of_token(plan: StepPlan, page_S: Tensor, wanted: bool) -> Tensor | None:
    """Each token's page of a per-token vector, the null page for base tokens."""
    if not wanted:
        return None
    page_T = torch.full((plan.num_tokens,), NULL_PAGE, dtype=torch.int64, device=plan.device)
    page_T[plan.parts.token_P] = page_S[plan.parts.slot_P]
    return page_T
