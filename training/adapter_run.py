"""One adapter in training: its settings, its data, and how far it has come. Its rows are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from storage.errors import AdapterCorruptError
from training.example_stream import ExampleStream
from training.schedule import learning_rate
from training.spec import AdapterSpec
from training.tokens import TokenSequence


class RunStatus(StrEnum):
    WAITING = "waiting"  # for a place
    TRAINING = "training"
    FINISHED = "finished"  # its rows are frozen, not published yet
    PUBLISHED = "published"
    BROKEN = "broken"  # told as failed; its sequences stay in the steps until its last one
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdapterData:
    """Tokenised data of one adapter, and what was lost on the way."""

    training: tuple[TokenSequence, ...]
    held_out: tuple[TokenSequence, ...] = ()
    truncated: int = 0
    dropped: int = 0


@dataclass(slots=True)
class AdapterRun:
    """Mutable state of one adapter. `step` counts finished steps of `num_steps`, also those after it broke."""

    spec: AdapterSpec
    data: AdapterData
    num_steps: int
    stream: ExampleStream = field(init=False)
    status: RunStatus = RunStatus.WAITING
    step: int = 0
    loss: float = math.nan
    best_held_out: float = math.inf
    best_step: int = 0  # of that loss
    loss_to_beat: float = math.inf  # by `min_improvement`, or patience wears
    evaluations_without_improvement: int = 0
    outcome: str = ""  # the published version, or why it failed

    def __post_init__(self) -> None:
        assert self.spec.seed is not None
        if self.spec.evaluation is not None and not self.data.held_out:
            raise ValueError(f"{self.name}: evaluation needs held-out sequences")
        self.stream = ExampleStream(len(self.data.training), self.spec.seed)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_training(self) -> bool:
        return self.status is RunStatus.TRAINING

    @property
    def is_broken(self) -> bool:
        return self.status is RunStatus.BROKEN

    @property
    def is_in_steps(self) -> bool:
        """Once it has a place; one that has broken may have been restored without."""
        return self.is_training or self.is_broken

    @property
    def is_over(self) -> bool:
        return self.status in (RunStatus.PUBLISHED, RunStatus.FAILED)

    @property
    def may_learn(self) -> bool:
        """Neither over nor broken: what it becomes is open."""
        return not (self.is_over or self.is_broken)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.spec, self.step, self.num_steps)

    @property
    def wants_evaluation(self) -> bool:
        evaluation = self.spec.evaluation
        return evaluation is not None and (
            self.step % evaluation.every_steps == 0 or self.step == self.num_steps
        )

    def draw(self) -> Sequence[TokenSequence]:
        """The next step's batch."""
        return [self.data.training[index] for index in self.stream.draw(self.spec.batch_size)]

    def note_held_out(self, loss: float) -> bool:
        """Take down an evaluation; says whether it is time to stop early."""
        if loss < self.best_held_out:
            self.best_held_out, self.best_step = loss, self.step
        rule = self.spec.early_stop
        if rule is None:
            return False
        if loss < self.loss_to_beat - rule.min_improvement:
            self.loss_to_beat, self.evaluations_without_improvement = loss, 0
        else:
            self.evaluations_without_improvement += 1
        return self.evaluations_without_improvement >= rule.patience

    @property
    def keeps_best(self) -> bool:
        """What is published is the best evaluated, not the last: whoever stops early stops after the best."""
        return self.spec.early_stop is not None

    def state(self) -> dict[str, Any]:
        """What `restore` takes: numbers and strings only."""
        return {
            "status": self.status.value,
            "step": self.step,
            "drawn": self.stream.drawn,
            "loss": self.loss,
            "best_held_out": self.best_held_out,
            "best_step": self.best_step,
            "loss_to_beat": self.loss_to_beat,
            "evaluations_without_improvement": self.evaluations_without_improvement,
            "outcome": self.outcome,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Whoever was training waits for a place again; so does one that has broken, and stays so. Raises as
        `check_whole`.
        """
        check_whole(self.name, state, self.state())
        status = RunStatus(state["status"])
        self.status = RunStatus.WAITING if status is RunStatus.TRAINING else status
        self.step = state["step"]
        self.stream.drawn = state["drawn"]
        self.loss = state["loss"]
        self.best_held_out = state["best_held_out"]
        self.best_step = state["best_step"]
        self.loss_to_beat = state["loss_to_beat"]
        self.evaluations_without_improvement = state["evaluations_without_improvement"]
        self.outcome = state["outcome"]


def check_whole(adapter: str, state: Mapping[str, Any], expected: Iterable[str]) -> None:
    """Raises AdapterCorruptError: it lacks what this build keeps, and a guess would train another adapter."""
    missing = sorted(set(expected) - set(state))
    if missing:
        raise AdapterCorruptError(
            f"the checkpoint of the adapter {adapter!r} was written by another build: it lacks {', '.join(missing)}; "
            "go on with the build that wrote it, or train under another job id"
        )


def next_waiting(runs: Sequence[AdapterRun], residents: Container[int]) -> int | None:
    """Whose turn it is to get a place: who had one before, then who has most steps left, then who was named first.

    None when all the others are over.
    """
    waiting = [
        number for number, run in enumerate(runs) if not run.is_over and number not in residents
    ]

    def turn(number: int) -> tuple[bool, int]:
        run = runs[number]
        return run.step == 0, run.step - run.num_steps

    return min(waiting, key=turn, default=None)
