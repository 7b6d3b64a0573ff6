"""Trainers whose steps are timed: those that jobs use, on random tokens, side by side over one frozen base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from training.adapter_run import AdapterData, AdapterRun
from training.frozen_base import FrozenBase
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainer import MultiAdapterTrainer

SEED = 0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class TimedTrainer:
    """A trainer that shares the frozen base with others: it takes the layers over before its steps.

    Args:
        ranks: of its FLoRA adapters, by the number that names each and decides its tokens.
    """

    def __init__(
        self, base: FrozenBase, ranks: Mapping[int, int], tokens: int, vocabulary: int
    ) -> None:
        self._base = base
        self._trainer = MultiAdapterTrainer(
            base,
            [_run(name, rank, tokens, vocabulary) for name, rank in ranks.items()],
            publish=_never,
            on_event=lambda event: None,
        )
        self._trainer.start()

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


def alternate(
    sides: Mapping[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, list[float]]:
    """Seconds of every side by round, in another order each time; one step before that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            taken[name].append(sides[name]())
        told = ", ".join(f"{name} {took[-1]:.2f} s" for name, took in taken.items())
        print(f"round {number}  {title}  {told}", flush=True)
    return taken


def ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(slow, fast, strict=True))


def random_sequence(name: int, tokens: int, vocabulary: int) -> TokenSequence:
    """Of so many uniform tokens to read, each of which has one to learn after it."""
    generator = torch.Generator().manual_seed(SEED + name)
    ids = torch.randint(3, vocabulary, (tokens + 1,), generator=generator).tolist()
    return TokenSequence(tuple(ids), (True,) * (tokens + 1))


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
    return AdapterRun(
        spec, AdapterData((random_sequence(name, tokens, vocabulary),)), spec.num_steps(1)
    )


def _never(*_: Any) -> NoReturn:
    raise RuntimeError("a benchmark publishes nothing")
