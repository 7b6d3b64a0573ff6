"""`flora jobs` with no cluster anywhere: what the store knows is enough."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore
from tests.cli.conftest import Flora, as_json
from tests.training.service.desks import VERSION, World
from training.events import AdapterPublished, AdapterStarted, AdapterStep, JobFinished, JobStarted
from training.job_store import JobStore
from training.service.job import FineTuningJob


@pytest.fixture
def store(home: Path) -> ObjectStore:
    return LocalObjectStore(home / "registry")


def run_job(store: ObjectStore, job_id: str, *adapters: str, is_killed: bool = False) -> None:
    """Three steps, each with half the loss of the one before."""
    job = JobStore(store, job_id)
    with job.writer("driver") as driver, job.writer("worker-0") as worker:
        driver(JobStarted(job_id, adapters, 1))
        for name in adapters:
            worker(AdapterStarted(name, "flora", 1, 0, 3, 8, 0, 0))
            for step in (1, 2, 3):
                worker(AdapterStep(name, step, 3, 4.0 / 2**step, 1.0, 1e-3, 9.0, tokens=5))
            worker(AdapterPublished(name, VERSION, "latest"))
        if not is_killed:
            driver(JobFinished(job_id, adapters, ()))


def test_a_job_whose_driver_was_killed_is_seen_to_be_silent(
    flora: Flora, store: ObjectStore, home: Path
) -> None:
    long_ago = time.time() - 3600
    with JobStore(store, "dead").writer("driver", lambda: long_ago) as driver:
        driver(JobStarted("dead", ("red",), 1))
    assert "silent" not in flora("jobs", "ls").stdout, "what was just written is not silent"
    for file in (home / "registry/jobs/dead").rglob("*.jsonl"):
        os.utime(file, (long_ago, long_ago))
    assert "silent for 60 min" in flora("jobs", "ls").stdout


def test_a_job_whose_driver_gives_no_sign_of_life_is_lost(
    flora: Flora, store: ObjectStore, home: Path
) -> None:
    run_job(store, "dead", "red", is_killed=True)
    run_job(store, "done", "red")
    for name in ("dead", "done"):
        JobStore(store, name).sign_of_life()
    rows = as_json(flora("jobs", "ls", "--json"))
    assert {row["job"]: row["status"] for row in rows} == {"dead": "running", "done": "succeeded"}
    long_ago = time.time() - 3600
    old = JobStore(store, "old")
    with old.writer("driver", lambda: long_ago) as driver:
        driver(JobStarted("old", ("red",), 1))
    old.sign_of_life()
    for file in (home / "registry/jobs/old").rglob("*"):
        os.utime(file, (long_ago, long_ago))
    rows = as_json(flora("jobs", "ls", "--json"))
    assert [row["status"] for row in rows if row["job"] == "old"] == ["lost"]
    assert "lost (no sign for 60 min)" in flora("jobs", "ls").stdout
    shown = as_json(flora("jobs", "show", "old", "--json"))
    assert shown["status"] == "lost" and "its terminal is gone" in shown["error"]
    old.sign_of_life()
    assert as_json(flora("jobs", "show", "old", "--json"))["status"] == "running", "it went on"


def test_who_stops_following_a_job_is_told_that_it_goes_on(
    flora: Flora, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(store, "long", "red", is_killed=True)

    def press_ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.jobs.time.sleep", press_ctrl_c)
    assert "flora jobs cancel long" in flora("jobs", "logs", "long", "--follow").stderr


def fine_tuned(store: ObjectStore) -> tuple[World, FineTuningJob, FineTuningJob]:
    """Two jobs of the API in one batch, the second still running."""
    world = World(store)
    one, two = world.create("one"), world.create("two")
    world.tick(0, 5)
    batch = world.now(one).batch
    assert batch is not None
    world.cluster.begin(batch)
    world.cluster.train(batch, "one")
    world.tick()
    return world, world.now(one), world.now(two)


def test_jobs_are_listed_newest_first_with_what_became_of_them(
    flora: Flora, store: ObjectStore
) -> None:
    assert "flora train" in flora("jobs", "ls").stdout
    run_job(store, "first", "red", "blue")
    run_job(store, "second", "green", is_killed=True)
    rows = as_json(flora("jobs", "ls", "--json"))
    assert [(row["job"], row["status"]) for row in rows] == [
        ("second", "running"),
        ("first", "succeeded"),
    ]
    assert rows[1]["adapters"] == ["red", "blue"]
    assert len(as_json(flora("jobs", "ls", "--limit", "1", "--json"))) == 1
    text = flora("jobs", "ls").stdout
    assert "red, blue" in text and "succeeded" in text


def test_a_job_is_shown_with_the_course_of_its_losses(flora: Flora, store: ObjectStore) -> None:
    run_job(store, "first", "red", "blue")
    shown = as_json(flora("jobs", "show", "first", "--json"))
    assert shown["status"] == "succeeded"
    red = shown["adapters"][0]
    assert (red["steps"], red["first_loss"], red["last_loss"]) == (3, 2.0, 0.5)
    assert red["version"] == VERSION and red["curve"][0] == "█"
    assert red["curve"] in flora("jobs", "show", "first").stdout


def test_a_jobs_losses_are_drawn_also_while_it_runs(
    flora: Flora, store: ObjectStore, tmp_path: Path
) -> None:
    run_job(store, "first", "red", is_killed=True)
    flora("jobs", "show", "first", "--picture", str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_has_every_step_also_when_nothing_runs_any_more(
    flora: Flora, store: ObjectStore
) -> None:
    run_job(store, "first", "red")
    lines = flora("jobs", "logs", "first", "--follow").stdout.splitlines()
    assert any("red" in line and "Step 2/3: training loss=1.0000" in line for line in lines)
    assert "1 published, 0 failed" in lines[-1]
    events = as_json(flora("jobs", "logs", "first", "--json"))
    assert events[0]["event"] == "job_started"


def test_jobs_of_the_api_are_known_by_their_own_ids(flora: Flora, store: ObjectStore) -> None:
    world, one, two = fine_tuned(store)
    rows = as_json(flora("jobs", "ls", "--json"))
    assert [(row["job"], row["status"]) for row in rows] == [
        (two.job_id, "running"),
        (one.job_id, "succeeded"),
    ]
    shown = as_json(flora("jobs", "show", one.job_id, "--json"))
    assert (shown["training_job"], shown["base"]) == (one.batch, "tiny")
    assert [adapter["adapter"] for adapter in shown["adapters"]] == ["one"]
    assert "two" not in flora("jobs", "logs", one.job_id).stdout.split()

    assert as_json(flora("jobs", "cancel", two.job_id, "--json"))["status"] == "cancelled"
    assert world.now(two).status.value == "cancelled"
    assert two.batch is not None and JobStore(store, two.batch).stopped() == {"two"}
    assert as_json(flora("jobs", "cancel", one.job_id, "--json"))["status"] == "succeeded"


@pytest.mark.parametrize("command", ["show", "logs", "cancel"])
def test_an_unknown_job_is_a_wrong_question(flora: Flora, command: str) -> None:
    assert "flora jobs ls" in flora("jobs", command, "nobody", code=2).stderr


def test_a_job_cannot_be_cancelled_where_no_cluster_is(flora: Flora, store: ObjectStore) -> None:
    run_job(store, "first", "red", is_killed=True)
    assert "no cluster is running" in flora("jobs", "cancel", "first", code=1).stderr


def test_where_the_settings_name_another_cluster_that_one_is_asked(
    flora: Flora, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(store, "first", "red", is_killed=True)
    monkeypatch.setenv("FLORA_TRAINING__JOB_ADDRESS", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in flora("jobs", "cancel", "first", code=1).stderr
    monkeypatch.setenv("FLORA_TRAINING__BACKEND", "kubernetes")
    assert "no service account" in flora("jobs", "cancel", "first", code=1).stderr
