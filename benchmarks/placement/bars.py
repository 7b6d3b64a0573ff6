"""Outcomes as rows with bars: what is to be reached. The ambitious bars are in `benchmarks/README.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol

from benchmarks.placement.measures import Outcome
from benchmarks.placement.policies import OURS, RAYS_RULE, RAYS_RULE_OUR_BANK, Policy
from benchmarks.results_file import Row

HIT_RANK_1 = {"drift": 0.975, "mmpp-adapter": 0.965}
HIT_MIXED = {"drift": 0.96, "mmpp-adapter": 0.93, "uniform": 0.95}
USUAL_HIT = {False: 0.985, True: 0.975}
IMBALANCE, WORST_IMBALANCE = 1.08, 1.12
LOADS = {"flash": 0.01, "drift": 0.02}
USUAL_LOADS = 0.005
CROWD_TICKS = 2.0
HIT_ABOVE_RAYS = {False: -0.005, True: 0.03}
EXCESS_OF_RAYS = 0.25


class Run(Protocol):
    """What a row must know of a run."""

    @property
    def policy(self) -> Policy: ...
    @property
    def workload(self) -> str: ...
    @property
    def is_mixed(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def name(self) -> str: ...


def hit_bar(workload: str, is_mixed: bool) -> float:
    """Of the hit rate over the best."""
    special = HIT_MIXED if is_mixed else HIT_RANK_1
    return special.get(workload, USUAL_HIT[is_mixed])


def rows_of(outcomes: Iterable[tuple[Run, Outcome]]) -> list[Row]:
    """A row for each figure of all runs of one name: a round for each seed. Rivals are told, not judged.

    Then ours beside Ray's rule, wherever both were run, and beside that rule with our bank, without bars.
    """
    outcomes = list(outcomes)
    named: dict[str, list[tuple[Run, Outcome]]] = {}
    for run, outcome in outcomes:
        named.setdefault(run.name, []).append((run, outcome))
    rows = [row for runs in named.values() for row in _rows(runs)]
    beside_rule = _beside(RAYS_RULE, "Ray's rule", outcomes, is_judged=True)
    beside_both = _beside(RAYS_RULE_OUR_BANK, "Ray's rule with our bank", outcomes, is_judged=False)
    return [*rows, *beside_rule, *beside_both]


def _rows(runs: list[tuple[Run, Outcome]]) -> list[Row]:
    run = runs[0][0]
    seen = [outcome for _, outcome in runs]

    def row(
        what: str, values: list[float], bar: float | None, better: Literal["higher", "lower"]
    ) -> Row:
        return Row(
            f"{run.name}: {what}", tuple(values), bar if run.policy is OURS else None, better
        )

    rows = [
        row(
            "hit rate over the best",
            [each.hit_of_best for each in seen],
            hit_bar(run.workload, run.is_mixed),
            "higher",
        ),
        row("imbalance", [each.imbalance for each in seen], IMBALANCE, "lower"),
        row("worst imbalance", [each.worst_imbalance for each in seen], WORST_IMBALANCE, "lower"),
        row("median wait, ms", [each.wait_p50_ms for each in seen], None, "lower"),
        row("99th percentile of waits, ms", [each.wait_p99_ms for each in seen], None, "lower"),
    ]
    if run.policy.is_planned:
        bar = LOADS.get(run.workload)
        if run.workload in ("zipf", "uniform"):
            bar = USUAL_LOADS
        loads = [each.loads for each in seen]
        rows.append(row("planned loads a minute over placements", loads, bar, "lower"))
    ticks = [each.crowd_ticks for each in seen if each.crowd_ticks is not None]
    if ticks:
        rows.append(row("ticks until the crowd waits no longer", ticks, CROWD_TICKS, "lower"))
    recovered = [each.recovery_s for each in seen if each.recovery_s is not None]
    if recovered:
        rows.append(row("seconds until the loss is not felt", recovered, None, "lower"))
    return rows


def _beside(
    rival: Policy, called: str, outcomes: Sequence[tuple[Run, Outcome]], is_judged: bool
) -> Iterator[Row]:
    """Two rows for each workload: hits above the rival, and what is over even load as a part of what it has over."""
    ours = {(_asked(run), run.seed): outcome for run, outcome in outcomes if run.policy is OURS}
    pairs: dict[tuple[str, bool], list[tuple[Outcome, Outcome]]] = {}
    for run, outcome in outcomes:
        mine = ours.get((_asked(run), run.seed))
        if run.policy is rival and mine is not None:
            pairs.setdefault((_asked(run), run.is_mixed), []).append((mine, outcome))
    for (asked, is_mixed), both in pairs.items():
        name = f"ours beside {called}{asked}"
        hits = tuple(mine.hit_of_best - other.hit_of_best for mine, other in both)
        above = HIT_ABOVE_RAYS[is_mixed] if is_judged else None
        yield Row(f"{name}: hit rate over the best, above", hits, above)
        excess = tuple((mine.imbalance - 1) / (other.imbalance - 1) for mine, other in both)
        part = EXCESS_OF_RAYS if is_judged else None
        yield Row(f"{name}: excess imbalance, part", excess, part, "lower")


def _asked(run: Run) -> str:
    """What a run's name says beside its policy."""
    return run.name.removeprefix(run.policy.name)
