"""A deterministic job: what one adapter's failure costs is its own. The others' steps are those beside it healthy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.tiny_jobs import (
    ANY_OTHER,
    NOT_A_NUMBER,
    Recorder,
    adapter,
    largest_difference,
    trained_with_token,
    trainer_with_token,
)
from training.events import AdapterEvaluated, AdapterFailed, AdapterPublished, AdapterStarted
from training.spec import AdapterSpec
from training.trainer import MultiAdapterTrainer

EVALUATION = {"fraction": 0.2, "every_steps": 4}
HEALTHY = [
    adapter("flora", rank=4, steps=30, evaluation=EVALUATION),
    adapter("lora", family="lora", rank=2, learning_rate=5e-3, steps=33, batch_size=2),
    adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=24),
    adapter("ia3", family="ia3", learning_rate=3e-2, steps=12),
    adapter("late", rank=6, steps=9, evaluation=EVALUATION),
]
"""Those that end make room for the last ones while the one that broke is still there."""
PLACES = 4
EXACT: dict[str, Any] = {"max_resident": PLACES, "is_deterministic": True}


def fed(family: str, **fields: Any) -> AdapterSpec:
    rank = 1 if family == "ia3" else 3
    return adapter(
        "fed", family=family, rank=rank, steps=27, batch_size=2, evaluation=EVALUATION, **fields
    )


def jobs_of(family: str) -> list[AdapterSpec]:
    return [HEALTHY[0], fed(family), *HEALTHY[1:]]


def assert_bits(found: Recorder, expected: Recorder) -> None:
    """Losses, evaluations, rows and who started when, of all but the one that broke."""
    for spec in HEALTHY:
        assert len(found.losses(spec.name)) == spec.steps
        assert found.losses(spec.name) == expected.losses(spec.name)
        rows, others = found.published[spec.name], expected.published[spec.name]
        assert largest_difference(rows, others) == 0.0
    for kind in (AdapterEvaluated, AdapterStarted, AdapterPublished):
        events = [[e for e in one.of(kind) if e.adapter != "fed"] for one in (found, expected)]
        assert events[0] == events[1]


@pytest.mark.parametrize("family", ["flora", "lora", "dora", "ia3"])
def test_the_others_become_what_they_would_beside_it_healthy(family: str) -> None:
    recorder = Recorder()
    job = trainer_with_token(jobs_of(family), "fed", NOT_A_NUMBER, recorder, **EXACT)
    job.run()

    (failure,) = recorder.of(AdapterFailed)
    assert failure.adapter == "fed"
    assert 0 < failure.step < fed(family).steps / 2, "it learnt before, and much would follow"
    assert f"the loss of step {failure.step + 1} is not finite" in failure.reason
    told = recorder.events.index(failure)
    assert told < recorder.events.index(recorder.of(AdapterPublished)[0]), "it is told at once"
    assert len(recorder.losses("fed")) == failure.step
    assert "fed" not in recorder.published
    assert not job.rows.residents and job.rows.check_integrity()
    expected = trained_with_token(jobs_of(family), "fed", ANY_OTHER, **EXACT)
    assert "fed" in expected.published
    assert_bits(recorder, expected)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_its_place_is_the_next_ones_once_it_is_left(is_deterministic: bool) -> None:
    """At once, or when the first of the others has ended: what the test above compares can differ."""
    options = {**EXACT, "is_deterministic": is_deterministic}
    found = trained_with_token(jobs_of("flora"), "fed", NOT_A_NUMBER, **options)
    changes = [e for e in found.events if isinstance(e, AdapterStarted | AdapterPublished)]
    assert isinstance(changes[PLACES], AdapterPublished if is_deterministic else AdapterStarted)


@pytest.mark.parametrize("cut_after", [1, 8, 20])
def test_a_checkpoint_keeps_it_broken(cut_after: int) -> None:
    """Cut off before it breaks, after, and when others have come: one failure is told, and no second start."""
    recorder = Recorder()
    specs = jobs_of("lora")

    def begin() -> MultiAdapterTrainer:
        return trainer_with_token(specs, "fed", NOT_A_NUMBER, recorder, **EXACT)

    job = begin()
    for _ in range(cut_after):
        job.step()
    states = [job.state_of(number) for number in range(len(specs))]
    job = begin()
    for number, state in enumerate(states):
        job.restore(number, state)
    job.run()

    (failure,) = recorder.of(AdapterFailed)
    starts = [event for event in recorder.of(AdapterStarted) if event.adapter == "fed"]
    assert len(starts) == (2 if cut_after <= failure.step else 1)
    expected = trained_with_token(specs, "fed", ANY_OTHER, **EXACT)
    for spec in HEALTHY:
        assert recorder.losses(spec.name) == expected.losses(spec.name)
        rows, others = recorder.published[spec.name], expected.published[spec.name]
        assert largest_difference(rows, others) == 0.0


def test_who_cancels_it_then_frees_its_place() -> None:
    recorder = Recorder()
    job = trainer_with_token(jobs_of("flora"), "fed", NOT_A_NUMBER, recorder, **EXACT)
    while not recorder.of(AdapterFailed):
        job.step()
    assert 1 in job.rows.residents
    job.stop("fed", "it was cancelled")
    assert 1 not in job.rows.residents
    job.run()
    assert len(recorder.of(AdapterFailed)) == 1
    assert recorder.published.keys() == {spec.name for spec in HEALTHY}


def test_alone_it_costs_no_forward() -> None:
    """Nobody is there whose steps it would keep as they are. Each step that learns reads the clock twice."""
    recorder, readings = Recorder(), []

    def clock() -> float:
        readings.append(1.0)
        return float(len(readings))

    job = trainer_with_token(
        [fed("flora")], "fed", NOT_A_NUMBER, recorder, is_deterministic=True, clock=clock
    )
    job.run()
    (failure,) = recorder.of(AdapterFailed)
    assert len(readings) == 2 * (failure.step + 1) < 2 * fed("flora").steps
