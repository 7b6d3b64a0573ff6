"""Many adapters trained in one pass over the base beside one after another and beside PEFT; and what rank costs.

Through the trainer that jobs use, without Ray: forward, backward, clipping and AdamW of every adapter. An adapter's
batch is one sequence of random tokens, all of them learnt. A round is one optimizer step of every adapter on each
side; of the adapters that train one after another a few are timed and stand for all, which are alike. All of it is
meant to take about 20 minutes on two quiet cores and 17 GB of memory; `--quick` measures the sizes that have bars.

    python -m benchmarks.training --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.command import parse, parser_of
from benchmarks.peak_memory import peak_mib
from benchmarks.results_file import Row, own_side, print_rows, write_result
from benchmarks.timed_training import (
    DTYPES,
    SEED,
    TimedTrainer,
    alternate,
    random_sequence,
    ratios,
)
from training.frozen_base import FrozenBase
from workers.large_pages import kept_memory
from workers.models.loading import load_base

if TYPE_CHECKING:
    from benchmarks.peft_training import PeftLoop

CLAIM = "Adapters train faster together than one after another, and a step hardly costs more for a higher rank."
FADED = 1.1
"""A gain that is not worth speaking of."""
_CPU = torch.device("cpu")
_BARS = {(8, 32): 2.0, (8, 128): 1.3}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is trained. `bars`: of (adapters, tokens). `apart`: adapters that stand for all one after another."""

    adapters: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (32, 128, 512)
    bars: Mapping[tuple[int, int], float] = field(default_factory=lambda: _BARS)
    farther: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: {8: (1024, 2048)})
    """By adapters, more tokens of each: without the peer, and only as long as the gain has not faded."""
    apart: int = 4
    ranks: tuple[int, int] = (1, 16)
    rank_bar: float = 1.8
    rank_tokens: int = 512
    rank_adapters: int = 1
    vocabulary: int = 40_000
    peft: bool = True


QUICK = Sizes(adapters=(1, 8), tokens=(32, 128), farther={})


def measure(
    base: Path,
    rounds: int,
    *,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = _CPU,
) -> list[Row]:
    """All rows of one type of the frozen base; rows of adapters and their optimizer are float32 in any."""
    sizes = sizes or Sizes()
    farther = chain.from_iterable(sizes.farther.get(count, ()) for count in sizes.adapters)
    longest = max(sizes.rank_tokens, *sizes.tokens, *farther)
    frozen = FrozenBase.adopt(load_base(str(base), dtype, device), max_tokens=longest + 1)
    kind = str(dtype).removeprefix("torch.")
    targets = sorted({path.rpartition(".")[2] for path in frozen.layers.projections})
    peft = None
    if sizes.peft:
        from benchmarks.peft_training import PeftLoop

        peft = PeftLoop(base, dtype, device, 1, targets)
    rows: list[Row] = []
    for count in sizes.adapters:
        gains = {}
        for tokens in sizes.tokens:
            found = _together_and_apart(frozen, peft, rounds, sizes, count, tokens, kind)
            gains[tokens] = found[0].value
            rows += found
        for tokens in sizes.farther.get(count, ()):
            if gains[max(gains)] >= FADED:
                found = _together_and_apart(frozen, None, rounds, sizes, count, tokens, kind)
                gains[tokens] = found[0].value
                rows += found
        faded = fades_at(gains)
        if count > 1 and faded is not None:
            name = f"{kind}, {count} adapters: tokens each from which together gains less than {FADED} ×"
            rows.append(Row(name, (faded,)))
    return [*rows, _rank_row(frozen, rounds, sizes, kind)]


def _together_and_apart(
    base: FrozenBase,
    peft: PeftLoop | None,
    rounds: int,
    sizes: Sizes,
    count: int,
    tokens: int,
    kind: str,
) -> list[Row]:
    """The gain first; then both sides in tokens per second, and the peer."""
    apart = min(count, sizes.apart)
    whole = TimedTrainer(base, dict.fromkeys(range(count), 1), tokens, sizes.vocabulary)
    single = [TimedTrainer(base, {name: 1}, tokens, sizes.vocabulary) for name in range(apart)]
    sides: dict[str, Callable[[], float]] = {
        "together": lambda: whole.seconds(1),
        "apart": lambda: sum(each.seconds(1) for each in single) * count / apart,
    }
    if peft is not None:
        loop, sequence = peft, random_sequence(0, tokens, sizes.vocabulary)
        sides["peft"] = lambda: loop.seconds(sequence, 1) * count
    title = f"{kind}, {count} FLoRA r1, {tokens} tokens each"
    took = alternate(sides, rounds, title)
    per_round = count * tokens
    gains = ratios(took["apart"], took["together"])
    rows = [
        Row(f"{title}: together / one after another", gains, sizes.bars.get((count, tokens))),
        Row(f"{title}: together, tokens/s", tuple(per_round / s for s in took["together"])),
        Row(f"{title}: one after another, tokens/s", tuple(per_round / s for s in took["apart"])),
    ]
    if "peft" in took:
        rows += [
            Row(f"{title}: PEFT's loop, tokens/s", tuple(per_round / s for s in took["peft"])),
            Row(f"{title}: together / PEFT's loop", ratios(took["peft"], took["together"])),
        ]
    return rows


def peak_rows(base: Path, sizes: Sizes, kind: str) -> list[Row]:
    """The most memory of all together at each size, each in a process of its own: what is freed stays with a process.

    One after another takes what one adapter takes.
    """
    rows = []
    for count in sizes.adapters:
        for tokens in sizes.tokens:
            peak = _peak_in_a_process(base, kind, count, tokens, sizes.vocabulary)
            name = f"{kind}, {count} FLoRA r1, {tokens} tokens each: together, peak MiB"
            rows += [] if peak is None else [Row(name, (peak,), better="lower")]
    return rows


def _peak_in_a_process(base: Path, *case: str | int) -> float | None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--peak", str(base), *map(str, case)],
        env={**os.environ, **kept_memory()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak: float | None = json.loads(ended.stdout.splitlines()[-1])
    return peak


def _peak(base: str, kind: str, adapters: str, tokens: str, vocabulary: str) -> float | None:
    """Of two steps of a trainer that is alone in this process."""
    loaded = load_base(base, DTYPES[kind], _CPU)
    frozen = FrozenBase.adopt(loaded, max_tokens=int(tokens) + 1)
    trainer = TimedTrainer(
        frozen, dict.fromkeys(range(int(adapters)), 1), int(tokens), int(vocabulary)
    )
    return peak_mib(lambda: trainer.seconds(2))


def _rank_row(base: FrozenBase, rounds: int, sizes: Sizes, kind: str) -> Row:
    low, high = (
        TimedTrainer(
            base,
            dict.fromkeys(range(sizes.rank_adapters), rank),
            sizes.rank_tokens,
            sizes.vocabulary,
        )
        for rank in sizes.ranks
    )
    took = alternate(
        {"low": lambda: low.seconds(1), "high": lambda: high.seconds(1)}, rounds, "ranks"
    )
    name = f"{kind}, training step, FLoRA r{sizes.ranks[1]} / r{sizes.ranks[0]}, {sizes.rank_tokens} tokens"
    return Row(name, ratios(took["high"], took["low"]), sizes.rank_bar, "lower")


def fades_at(gains: Mapping[int, float]) -> float | None:
    """The tokens of an adapter's batch at which the gain reaches `FADED`, between measured sizes; None: at none."""
    points = sorted(gains.items())
    for (few, before), (many, after) in pairwise(points):
        if before >= FADED > after:
            share = (before - FADED) / (before - after)
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return None


def _sizes(kind: str, is_quick: bool) -> Sizes:
    if is_quick:
        return QUICK
    # float32 is bound by arithmetic: more adapters tell no more.
    return Sizes(adapters=(1, 8)) if kind == "float32" else Sizes()


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(_peak(*sys.argv[2:])))
        return
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument(
        "--quick", action="store_true", help="1 and 8 adapters, 32 and 128 tokens only"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=[*DTYPES])
    arguments = parse(parser, kept_memory())
    sizes = {name: _sizes(name, arguments.quick) for name in arguments.dtype}
    # First, while this process has kept no memory of steps of its own.
    peaks = [row for name in sizes for row in peak_rows(arguments.base, sizes[name], name)]
    rows: list[Row] = []
    for name in sizes:
        rows += measure(arguments.base, arguments.rounds, sizes=sizes[name], dtype=DTYPES[name])
    rows += peaks
    print_rows(rows)
    path = write_result(
        "training",
        CLAIM,
        rows,
        seed=SEED,
        workload={
            "dtypes": arguments.dtype,
            "batch": "one sequence of uniform tokens per adapter and step, all learnt",
            "apart": f"{Sizes().apart} adapters stand for all that train one after another",
        },
        sides=[own_side("together"), own_side("one after another"), own_side("PEFT's loop")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
