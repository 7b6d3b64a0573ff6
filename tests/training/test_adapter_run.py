"""One adapter's progress without its rows: its best evaluation, and when it stops."""

from __future__ import annotations

import pytest

from storage.errors import AdapterCorruptError
from tests.training.tiny_jobs import adapter, run_of, sequences
from training.adapter_run import AdapterRun


def evaluated(run: AdapterRun, *losses: float) -> list[bool]:
    """What each evaluation in a row says, one a step."""
    says = []
    for loss in losses:
        run.step += 1
        says.append(run.note_held_out(loss))
    return says


def stopping_run() -> AdapterRun:
    spec = adapter(
        "one",
        evaluation={"fraction": 0.2, "every_steps": 1},
        early_stop={"patience": 3, "min_improvement": 0.1},
    )
    return run_of(spec, held_out=sequences("one", 3))


def test_the_best_evaluation_counts_however_little_it_is_better() -> None:
    run = stopping_run()
    assert evaluated(run, 1.0, 0.95, 0.93, 0.91) == [False, False, False, True]
    assert (run.best_step, run.best_held_out) == (4, 0.91)
    run = stopping_run()
    evaluated(run, 1.0, 0.91, 0.93, 0.95)
    assert (run.best_step, run.best_held_out) == (2, 0.91)


def test_small_steps_that_come_to_an_improvement_renew_patience() -> None:
    assert not any(evaluated(stopping_run(), 1.0, 0.95, 0.92, 0.89, 0.85, 0.82, 0.78))


def test_a_checkpoint_keeps_both_the_best_and_what_patience_waits_for() -> None:
    before = stopping_run()
    evaluated(before, 1.0, 0.95, 0.93)
    after = stopping_run()
    after.restore(before.state())
    assert evaluated(after, 0.94) == [True]
    assert (after.best_step, after.best_held_out) == (3, 0.93)


@pytest.mark.parametrize("key", ["best_step", "loss_to_beat"])
def test_a_state_of_an_older_build_is_refused_by_name_and_changes_nothing(key: str) -> None:
    before, after = stopping_run(), stopping_run()
    evaluated(before, 1.0, 0.95)
    older = {name: value for name, value in before.state().items() if name != key}
    with pytest.raises(AdapterCorruptError, match=f"'one'.*another build: it lacks {key}"):
        after.restore(older)
    assert after.step == 0
