"""Row mode and weight mode of the training step, timed at every size: does the cost model choose the faster one?

Both sides are whole optimizer steps of two FLoRA adapters; a size near the crossing, where both take about the same,
may be chosen wrongly and cost little. Takes about a quarter of an hour on two quiet cores.

    python -m benchmarks.training_modes --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.command import parse, parser_of
from benchmarks.results_file import Row, own_side, print_rows, write_result
from benchmarks.timed_training import DTYPES, SEED, TimedTrainer, alternate, ratios
from training.frozen_base import FrozenBase
from workers.large_pages import kept_memory
from workers.models.loading import load_base
from workers.row_form.cost import CostModel, training_cost

CLAIM = "A training step computes each adapter in the mode that is faster for its tokens and rank."
BAR = 1.15
"""What a wrong choice near the crossing, and noise, may cost."""
OFFSET = 1  # of FLoRA adapters, unless their specification says otherwise


@dataclass(frozen=True, slots=True)
class Sizes:
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: tuple[int, ...] = (32, 128, 512)
    adapters: int = 2
    mixed_ranks: tuple[int, ...] = (1, 2, 4, 8)
    mixed_tokens: int = 165
    vocabulary: int = 40_000


FORMER_BFLOAT16 = CostModel(build_rows=250.0, build_rows_per_rank=2.0)
"""Weight mode's cost over a bfloat16 base as it was first taken down, from its products alone."""


def measure(base: Path, rounds: int, dtype: torch.dtype, sizes: Sizes | None = None) -> list[Row]:
    """One row for every rank and length; in bfloat16 also what the present figures of the cost model bring."""
    sizes = sizes or Sizes()
    longest = max(*sizes.tokens, sizes.mixed_tokens)
    cpu = torch.device("cpu")
    frozen = FrozenBase.adopt(load_base(str(base), dtype, cpu), max_tokens=longest + 1)
    kind = str(dtype).removeprefix("torch.")
    rows = [
        _cell(frozen, rounds, sizes, rank, tokens, kind)
        for tokens in sizes.tokens
        for rank in sizes.ranks
    ]
    if dtype != torch.bfloat16:
        return rows
    costs = (FORMER_BFLOAT16, training_cost(dtype))
    before, after = _timed(frozen, rounds, sizes.mixed_ranks, sizes.mixed_tokens, costs, sizes)
    ranks = ", ".join(map(str, sizes.mixed_ranks))
    name = f"{kind}, ranks {ranks}, {sizes.mixed_tokens} tokens each: weight mode's cost measured"
    return [*rows, Row(name, ratios(before, after))]


def _cell(base: FrozenBase, rounds: int, sizes: Sizes, rank: int, tokens: int, kind: str) -> Row:
    """The chosen mode's time over the faster one's."""
    cost = training_cost(base.dtype)
    modes = (replace(cost, build_rows=math.inf), replace(cost, build_rows=-math.inf))
    by_rows, by_weights = _timed(base, rounds, (rank,) * sizes.adapters, tokens, modes, sizes)
    is_by_weights = cost.prefers_weight_mode(tokens, rank, OFFSET)
    chosen = by_weights if is_by_weights else by_rows
    faster = min(by_rows, by_weights, key=median)
    name = f"{kind}, FLoRA r{rank}, {tokens} tokens each: by {'weights' if is_by_weights else 'rows'} / the faster mode"
    return Row(name, ratios(chosen, faster), BAR, "lower")


def _timed(
    base: FrozenBase,
    rounds: int,
    ranks: Sequence[int],
    tokens: int,
    costs: tuple[CostModel, CostModel],
    sizes: Sizes,
) -> tuple[list[float], list[float]]:
    """Seconds of a step of these adapters by round, under one cost model and under the other."""
    trainer = TimedTrainer(base, dict(enumerate(ranks)), tokens, sizes.vocabulary)

    def under(cost: CostModel) -> float:
        base.layers.use_cost(cost)
        return trainer.seconds(1)

    sides = {"first": lambda: under(costs[0]), "second": lambda: under(costs[1])}
    took = alternate(sides, rounds, f"ranks {tuple(ranks)}, {tokens} tokens each")
    return took["first"], took["second"]


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=[*DTYPES])
    arguments = parse(parser, kept_memory())
    rows: list[Row] = []
    for name in arguments.dtype:
        # In float32 the crossing is at fewer tokens, and a row costs more.
        sizes = Sizes(tokens=(32, 128)) if name == "float32" else Sizes()
        rows += measure(arguments.base, arguments.rounds, DTYPES[name], sizes)
    print_rows(rows)
    path = write_result(
        "training_modes",
        CLAIM,
        rows,
        seed=SEED,
        workload={
            "dtypes": arguments.dtype,
            "batch": f"one sequence of uniform tokens for each of {Sizes().adapters} adapters, all learnt",
            "FLoRA": f"offset {OFFSET}",
        },
        sides=[own_side("by rows"), own_side("by weights")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
