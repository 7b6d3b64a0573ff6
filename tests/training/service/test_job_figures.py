"""Each job is counted where it is, and when it ends once."""

from __future__ import annotations

from storage.object_store import ObjectStore
from tests.training.service.desks import World
from training.service.job import FineTuningJob, FineTuningRequest, FineTuningStatus
from training.service.job_figures import JobFigures

VALIDATING, QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = FineTuningStatus


def job(job_id: str, status: FineTuningStatus, tokens: int | None = None) -> FineTuningJob:
    request = FineTuningRequest(tenant="t", base="b", base_id="b", training_file="f", seed=0)
    return FineTuningJob(job_id=job_id, created_s=0, request=request, status=status, tokens=tokens)


def shown(figures: JobFigures) -> dict[str, float]:
    """What is not zero, by label or by name."""
    read = figures.read()
    values = {**read.gauges, **read.counters}
    return {"".join(labels) or name: value for (name, labels), value in values.items() if value}


def test_all_series_are_there_before_the_first_job() -> None:
    read = JobFigures().read()
    statuses = {labels[0] for _, labels in (*read.gauges, *read.counters) if labels}
    assert statuses == {status.value for status in FineTuningStatus}
    assert shown(JobFigures()) == {}


def test_a_job_that_ended_is_counted_once_however_long_it_lies_there() -> None:
    figures = JobFigures()
    figures.see([job("a", QUEUED), job("b", RUNNING), job("c", RUNNING)])
    assert shown(figures) == {"queued": 1, "running": 2}
    for _ in range(3):
        figures.see([job("a", CANCELLED), job("b", SUCCEEDED, 50), job("c", RUNNING)])
    tokens = "flora_training_tokens_total"
    assert shown(figures) == {"running": 1, "cancelled": 1, "succeeded": 1, tokens: 50}
    figures.see([job("c", SUCCEEDED, 7), job("d", FAILED), job("e", VALIDATING)])
    ended = {"cancelled": 1, "succeeded": 2, "failed": 1, tokens: 57}
    assert shown(figures) == {"validating_files": 1, **ended}
    figures.leave()
    assert shown(figures) == ended, "what lies there is told by whoever sees to it"


def test_a_desk_counts_what_becomes_of_its_jobs(local: ObjectStore) -> None:
    world = World(local)
    good, bad = world.create("good"), world.create("bad")
    world.tick(0, 5)
    batch = world.now(good).batch
    assert batch is not None
    world.cluster.begin(batch)
    world.tick(1, 1)
    assert shown(world.desk.figures) == {"running": 2}
    world.cluster.train(batch, "good")
    world.cluster.train(batch, "bad", fails="no")
    world.cluster.finish(batch)
    world.tick(1, 1, 1)
    tokens = world.now(good).tokens
    assert tokens and world.now(bad).status is FAILED
    ended = {"succeeded": 1, "failed": 1, "flora_training_tokens_total": tokens}
    assert shown(world.desk.figures) == ended
