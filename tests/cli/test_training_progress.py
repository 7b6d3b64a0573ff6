"""What a person sees of a training job, in a terminal and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from cli.training_progress import TrainingProgress
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
)
from training.learning_curve import Curve

VERSION = "ab" * 32


def step(adapter: str, number: int, loss: float) -> AdapterStep:
    return AdapterStep(adapter, number, 4, loss, 1.0, 1e-3, 100.0)


def started(adapter: str, at: int = 0) -> AdapterStarted:
    return AdapterStarted(adapter, "flora", 2, at, 4, 16, 0, 0)


def progress_of(
    events: list[TrainingEvent], is_terminal: bool = True, width: int = 120
) -> tuple[TrainingProgress, str]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=width)
    with TrainingProgress(console) as progress:
        for event in events:
            progress.show(event)
    return progress, file.getvalue()


def test_each_adapter_has_a_bar_with_its_loss() -> None:
    events = [JobStarted("job", ("red", "blue"), 1), started("red"), step("red", 1, 2.5)]
    _, seen = progress_of(events)
    assert "red" in seen and "1/4" in seen and "loss 2.5000" in seen
    assert "blue" in seen and "waiting" in seen


def test_steps_told_again_after_a_resume_count_once() -> None:
    events = [started("red"), *(step("red", n, 3.0) for n in (1, 2, 3))]
    events += [started("red", at=1), step("red", 2, 2.0)]
    progress, _ = progress_of(events)
    assert progress.curves == (Curve("red", ((1, 3.0), (2, 2.0))),)


def test_held_out_losses_are_shown_beside_those_of_training() -> None:
    events = [started("red"), step("red", 1, 2.5), AdapterEvaluated("red", 1, 2.75)]
    events += [AdapterPublished("red", VERSION, "latest")]
    for width in (120, 80):
        _, seen = progress_of(events, width=width)
        assert "1/4" in seen and "loss 2.5000" in seen and "held out 2.7500" in seen


def test_what_became_of_each_adapter_is_kept() -> None:
    events = [
        AdapterPublished("red", VERSION, "latest"),
        AdapterFailed("blue", 3, "its loss is not finite"),
        JobFinished("job", ("red",), ("blue",)),
    ]
    progress, seen = progress_of(events)
    assert progress.published == {"red": VERSION}
    assert progress.failed == {"blue": "its loss is not finite"}
    assert progress.is_over and progress.failure is None
    assert VERSION[:12] in seen and "not finite" in seen


def test_a_job_that_broke_says_why() -> None:
    progress, _ = progress_of([JobFailed("job", "out of memory")])
    assert progress.is_over and progress.failure == "out of memory"


def test_a_log_without_a_terminal_hears_of_results() -> None:
    _, log = progress_of([step("red", 1, 2.0), AdapterPublished("red", VERSION, "prod")], False)
    assert f"red: published as {VERSION}" in log
    assert "\x1b" not in log
