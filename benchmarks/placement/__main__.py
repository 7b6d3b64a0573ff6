"""`python -m benchmarks.placement`: ours and its rivals under every workload, against the bars.

The whole matrix takes more than an hour of one core; the file is written anew after every run, so a run cut short
leaves what it has. `--quick` is a small fleet for a short time, to see that it works: it writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.placement.bars import rows_of
from benchmarks.placement.measures import Outcome, judge
from benchmarks.placement.policies import OURS, RAYS_RULE_OUR_BANK, RIVALS, Policy
from benchmarks.placement.simulation import Loss, Simulation
from benchmarks.placement.traces import (
    LOAD_S,
    MEAN_SERVICE_S,
    SERVICE_SIGMA,
    WORKLOADS,
    Fleet,
    Span,
    draw,
)
from benchmarks.results_file import write_result

SEEDS = (1, 2, 3)
HELD_OUT_SEED = 29
UTILISATIONS = (0.85, 0.55)
"""Rivals are run at the lower: some never recover from a cold start at the higher."""
QUICK_FLEET = {"adapters": 600, "replicas": 6}
QUICK_SPAN = Span(duration_s=60, warmup_s=30, crowd_s=40, window_s=10)
CLAIM = (
    "The placement and routing of the cluster keep adapters where their load needs them, better than least-loaded "
    "routing, bounded-load consistent hashing and the rule of Ray's multiplexing"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One run. `name` is what its rows are called by; runs of one name differ in their seed only."""

    policy: Policy
    workload: str
    is_mixed: bool
    utilisation: float
    seed: int
    routers: int = 1
    has_loss: bool = False

    @property
    def name(self) -> str:
        parts = [self.policy.name, self.workload, "mixed ranks" if self.is_mixed else "rank 1"]
        parts.append(f"{self.utilisation:g}")
        if self.routers > 1:
            parts.append(f"{self.routers} routers")
        if self.has_loss:
            parts.append("replica lost")
        if self.seed == HELD_OUT_SEED:
            parts.append("held-out seed")
        return ", ".join(parts)


def matrix(seeds: Iterable[int]) -> Iterator[Case]:
    """What matters most comes first."""
    first, *others = seeds
    high, low = UTILISATIONS
    both = (False, True)
    rest = [workload for workload in WORKLOADS if workload != "zipf"]
    yield from (Case(OURS, w, is_mixed, high, first) for is_mixed in both for w in WORKLOADS)
    for policy in (OURS, *RIVALS):
        yield from (Case(policy, "zipf", is_mixed, low, first) for is_mixed in both)
    yield from (Case(OURS, "zipf", is_mixed, high, first, has_loss=True) for is_mixed in both)
    for utilisation in UTILISATIONS:
        yield from (Case(OURS, w, m, utilisation, HELD_OUT_SEED) for m in both for w in WORKLOADS)
    yield from (Case(OURS, w, is_mixed, low, first) for is_mixed in both for w in rest)
    yield from (Case(OURS, "zipf", is_mixed, high, first, routers=4) for is_mixed in both)
    for seed in others:
        for utilisation in UTILISATIONS:
            yield from (Case(OURS, w, m, utilisation, seed) for m in both for w in WORKLOADS)
    for policy in RIVALS:
        yield from (Case(policy, w, is_mixed, low, first) for is_mixed in both for w in rest)
    yield from (Case(RAYS_RULE_OUR_BANK, w, True, low, first) for w in WORKLOADS)


def run(
    case: Case, span: Span | None = None, adapters: int = 10_000, replicas: int = 64
) -> Outcome:
    """Simulate one case."""
    span = span or Span()
    fleet = Fleet(adapters, replicas, routers=case.routers, is_mixed=case.is_mixed)
    trace = draw(case.workload, fleet, case.utilisation, case.seed, span)
    loss = None
    if case.has_loss:
        loss = Loss(at_s=span.crowd_s, back_s=span.crowd_s + (span.duration_s - span.crowd_s) / 2)
    simulation = Simulation(fleet, trace, case.policy, case.seed, loss=loss)
    with _uncollected():
        record = simulation.run()
    simulation.check_integrity()
    return judge(fleet, trace, span, record, loss)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A run makes no cycles worth collecting, and looking for them is a third of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def told(case: Case, outcome: Outcome, took_s: float) -> str:
    parts = [
        f"{case.name:<62} seed {case.seed:<2}",
        f"hit/best {outcome.hit_of_best:.4f}",
        f"imbalance {outcome.imbalance:.3f} worst {outcome.worst_imbalance:.3f}",
        f"wait p50 {outcome.wait_p50_ms:.0f} p99 {outcome.wait_p99_ms:.0f} ms",
        f"loads {outcome.loads:.3%}",
    ]
    if outcome.crowd_ticks is not None:
        parts.append(f"crowd {outcome.crowd_ticks:.0f} ticks")
    if outcome.recovery_s is not None:
        parts.append(f"recovery {outcome.recovery_s:.0f} s")
    return "  ".join([*parts, f"({took_s:.0f} s)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small fleet for a short time")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no run after this")
    options = parser.parse_args()
    began_s = time.monotonic()
    outcomes: dict[Case, Outcome] = {}
    cases = list(matrix(options.seeds))
    if options.quick:
        policies = (OURS, *RIVALS)
        cases = [
            Case(policy, w, False, UTILISATIONS[1], 1)
            for w in ("zipf", "flash")
            for policy in policies
        ]
    for case in cases:
        start_s = time.monotonic()
        if start_s - began_s > 60 * options.minutes:
            break
        if options.quick:
            outcomes[case] = run(case, QUICK_SPAN, **QUICK_FLEET)
        else:
            outcomes[case] = run(case)
            write(outcomes)
        print(told(case, outcomes[case], time.monotonic() - start_s))
        sys.stdout.flush()
    if options.quick:
        return
    for row in rows_of(outcomes.items()):
        if row.met is False:
            print(f"missed  {row.name}: {row.value:.4g}, bar {row.bar:g}")


def write(outcomes: dict[Case, Outcome]) -> None:
    """The result so far."""
    write_result(
        "placement",
        CLAIM,
        rows_of(outcomes.items()),
        seed=SEEDS[0],
        workload={
            "seeds": sorted({case.seed for case in outcomes}),
            "held-out seed": HELD_OUT_SEED,
            "fleet": "10,000 adapters; 64 replicas × 8 slots; 100 rows of rank 1, or 800 rows and "
            "ranks 1…64 log-uniform",
            "service": f"lognormal, mean {MEAN_SERVICE_S} s, σ {SERVICE_SIGMA}",
            "load": f"{LOAD_S} s of a slot",
            "span": "240 s, 90 s of them warm-up",
            "views": "heartbeats and polls every 0.5 s each",
            "runs": len(outcomes),
        },
    )


if __name__ == "__main__":
    main()
