"""Many adapters trained in one pass over the base model beside one after another, and what rank costs in training.

Through the trainer that jobs use, without Ray: forward, backward, clipping and AdamW of every adapter. An adapter's
batch is one sequence of random tokens, all of them learnt. A round is the same number of optimizer steps of every
adapter on both sides.

    python -m benchmarks.training --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.command import parse, parser_of
from benchmarks.results_file import Row, own_side, print_rows, write_result
from training.adapter_run import AdapterData, AdapterRun
from training.frozen_base import FrozenBase
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer
from workers.models.loading import load_base

CLAIM = "Adapters train faster together than one after another, and a step hardly costs more for a higher rank."
SEED = 0
_VOCABULARY = 40_000
_CPU = torch.device("cpu")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Sizes:
    """`together`: tokens of one adapter's batch and the bar of that row. `ranks`: the low one and the high one."""

    adapters: int = 8
    together: tuple[tuple[int, float], ...] = ((32, 2.0), (128, 1.3))
    ranks: tuple[int, int] = (1, 16)
    rank_bar: float = 1.8
    rank_tokens: int = 512
    rank_adapters: int = 1
    vocabulary: int = _VOCABULARY


def measure(
    base: Path,
    rounds: int,
    *,
    sizes: Sizes | None = None,
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> list[Row]:
    """All rows of the table.

    Args:
        steps: optimizer steps of every adapter in a round.
        dtype: of the frozen base; float32 is a job's default.
    """
    sizes = sizes or Sizes()
    longest = max(sizes.rank_tokens, *(tokens for tokens, _ in sizes.together))
    loaded = load_base(str(base), dtype, device)
    frozen = FrozenBase.adopt(loaded, max_tokens=longest + 1)
    rows: list[Row] = []
    for tokens, bar in sizes.together:
        names = range(sizes.adapters)
        together = [_Trainer(frozen, names, 1, tokens, sizes.vocabulary)]
        apart = [_Trainer(frozen, [name], 1, tokens, sizes.vocabulary) for name in names]
        fast, slow = _alternate(together, apart, rounds, steps, f"{tokens} tokens")
        count = sizes.adapters * tokens * steps
        title = f"{sizes.adapters} FLoRA r1, {tokens} tokens each"
        rows += [
            Row(
                f"{title}: trained together / one after another",
                tuple(b / a for a, b in zip(fast, slow, strict=True)),
                bar,
            ),
            Row(f"{title}: together, tokens per second", tuple(count / a for a in fast)),
        ]
    low, high = (
        [_Trainer(frozen, range(sizes.rank_adapters), rank, sizes.rank_tokens, sizes.vocabulary)]
        for rank in sizes.ranks
    )
    fast, slow = _alternate(low, high, rounds, steps, "ranks")
    rows.append(
        Row(
            f"training step, FLoRA r{sizes.ranks[1]} / r{sizes.ranks[0]}, {sizes.rank_tokens} tokens per adapter",
            tuple(b / a for a, b in zip(fast, slow, strict=True)),
            sizes.rank_bar,
            "lower",
        )
    )
    return rows


class _Trainer:
    """A trainer that shares the frozen base with others: it takes the layers over before its steps."""

    def __init__(
        self, base: FrozenBase, names: Sequence[int], rank: int, tokens: int, vocabulary: int
    ) -> None:
        self._base = base
        self._trainer = MultiAdapterTrainer(
            base,
            [_run(name, rank, tokens, vocabulary) for name in names],
            publish=_never,
            on_event=lambda event: None,
        )

    def seconds(self, steps: int) -> float:
        """Time of so many optimizer steps of all its adapters. Raises RuntimeError when one of them fails."""
        self._base.layers.bind(self._trainer.rows.bank)
        began = time.perf_counter()
        for _ in range(steps):
            self._trainer.step()
        took = time.perf_counter() - began
        failed = [run.outcome for run in self._trainer.runs if not run.is_training]
        if failed:
            raise RuntimeError(f"an adapter stopped training: {failed[0]}")
        return took


def _alternate(
    one: Sequence[_Trainer], other: Sequence[_Trainer], rounds: int, steps: int, title: str
) -> tuple[list[float], list[float]]:
    """Seconds of both sides by round; a side is the sum of its trainers."""
    taken: tuple[list[float], list[float]] = ([], [])
    for side in (one, other):
        side[0].seconds(1)
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            taken[index].append(sum(each.seconds(steps) for each in (one, other)[index]))
        print(f"round {number}  {title}  {taken[0][-1]:.2f} s, {taken[1][-1]:.2f} s", flush=True)
    return taken


def _run(name: int, rank: int, tokens: int, vocabulary: int) -> AdapterRun:
    spec = AdapterSpec.model_validate(
        {
            "name": f"adapter-{name}",
            "data": "random.jsonl",
            "rank": rank,
            "steps": 1_000_000,
            "batch_size": 1,
            "sequence_length": tokens + 1,
            "seed": SEED + name,
        }
    )
    generator = torch.Generator().manual_seed(SEED + name)
    sequence = TokenSequence(
        tuple(torch.randint(3, vocabulary, (tokens + 1,), generator=generator).tolist()),
        (True,) * (tokens + 1),
    )
    return AdapterRun(spec, AdapterData((sequence,)), spec.num_steps(1))


def _never(*_: Any) -> NoReturn:
    raise RuntimeError("a benchmark publishes nothing")


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=1, help="of every adapter in a round")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the frozen base")
    arguments = parse(parser)
    rows = measure(
        arguments.base, arguments.rounds, steps=arguments.steps, dtype=_DTYPES[arguments.dtype]
    )
    print_rows(rows)
    path = write_result(
        "training",
        CLAIM,
        rows,
        seed=SEED,
        workload={
            "dtype": arguments.dtype,
            "steps_per_round": arguments.steps,
            "batch": "one sequence of uniform tokens per adapter and step, all learnt",
        },
        sides=[own_side("together"), own_side("one after another")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
