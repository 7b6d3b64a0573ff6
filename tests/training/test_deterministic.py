"""A deterministic job: what one adapter's failure costs is its own. The others' steps are those beside it healthy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore
from tests.training.round_parts import JOB, run_attempt
from tests.training.tiny_jobs import (
    ANY_OTHER,
    NOT_A_NUMBER,
    Recorder,
    adapter,
    largest_difference,
    trained_with_token,
    trainer_with_token,
)
from training.checkpoints import Checkpoints
from training.events import AdapterEvaluated, AdapterFailed, AdapterPublished, AdapterStarted
from training.rounds import Work
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
EXACT: dict[str, Any] = {"max_resident": PLACES, "keeps_broken": True}


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


@pytest.mark.parametrize("keeps_broken", [False, True])
def test_its_place_is_the_next_ones_once_it_is_left(keeps_broken: bool) -> None:
    """At once, or when the first of the others has ended. Without it the others' bits are other ones."""
    options = {**EXACT, "keeps_broken": keeps_broken}
    found = trained_with_token(jobs_of("flora"), "fed", NOT_A_NUMBER, **options)
    changes = [e for e in found.events if isinstance(e, AdapterStarted | AdapterPublished)]
    assert isinstance(changes[PLACES], AdapterPublished if keeps_broken else AdapterStarted)
    expected = trained_with_token(jobs_of("flora"), "fed", ANY_OTHER, **EXACT)
    is_same = all(found.losses(one.name) == expected.losses(one.name) for one in HEALTHY)
    assert is_same is keeps_broken


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


def test_one_that_broke_waits_for_a_place_where_there_are_fewer() -> None:
    recorder = Recorder()
    specs = jobs_of("lora")
    job = trainer_with_token(specs, "fed", NOT_A_NUMBER, recorder, **EXACT)
    while not recorder.of(AdapterFailed):
        job.step()
    states = [job.state_of(number) for number in range(len(specs))]
    narrow = {**EXACT, "max_resident": 2}
    job = trainer_with_token(specs, "fed", NOT_A_NUMBER, recorder, **narrow)
    for number, state in enumerate(states):
        job.restore(number, state)
    job.run()
    assert recorder.published.keys() == {spec.name for spec in HEALTHY}
    assert len(recorder.of(AdapterFailed)) == 1


def in_rounds(store: ObjectStore, specs: list[AdapterSpec], token: int) -> Recorder:
    """On two workers, from checkpoint to checkpoint."""
    recorder, by_name = Recorder(), {spec.name: spec for spec in specs}
    steps = {spec.name: spec.num_steps(12) for spec in specs}
    costs = {name: float(count) for name, count in steps.items()}

    making = threading.Lock()  # random models, by torch's one seed

    def build(share: Sequence[str]) -> MultiAdapterTrainer:
        mine = [by_name[name] for name in share]
        places = min(2, len(mine))
        with making:
            return trainer_with_token(
                mine, "fed", token, recorder, keeps_broken=True, max_resident=places
            )

    run_attempt(store, workers=2, work=Work("d" * 64, costs, steps, 5), build=build)
    return recorder


def test_shares_and_rounds_are_those_of_the_healthy_run(local: ObjectStore, tmp_path: Path) -> None:
    found = in_rounds(local, jobs_of("flora"), NOT_A_NUMBER)
    expected = in_rounds(LocalObjectStore(tmp_path / "other"), jobs_of("flora"), ANY_OTHER)
    assert len(found.of(AdapterFailed)) == 1
    for spec in HEALTHY:
        assert found.losses(spec.name) == expected.losses(spec.name)
        rows, others = found.published[spec.name], expected.published[spec.name]
        assert largest_difference(rows, others) == 0.0


def test_a_job_ends_when_only_those_that_broke_are_left(local: ObjectStore) -> None:
    long = fed("flora").model_copy(update={"steps": 10_000})
    found = in_rounds(local, [long, *HEALTHY], NOT_A_NUMBER)
    assert found.published.keys() == {spec.name for spec in HEALTHY}
    commit = Checkpoints(local, JOB).read("d" * 64)
    assert commit is not None and commit.is_over("fed")
    assert commit.round <= 1 + sum(spec.num_steps(12) for spec in HEALTHY) / 5


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
        [fed("flora")], "fed", NOT_A_NUMBER, recorder, keeps_broken=True, clock=clock
    )
    job.run()
    (failure,) = recorder.of(AdapterFailed)
    assert len(readings) == 2 * (failure.step + 1) < 2 * fed("flora").steps
