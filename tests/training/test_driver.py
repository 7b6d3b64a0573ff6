"""A job's driver: a store that is away for a moment ends nothing, and whatever ends the driver is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from storage.errors import OverloadedError, StoreUnavailableError
from storage.object_store import ObjectStore, StoredObject
from tests.storage.passing_store import PassingStore
from tests.training.round_parts import JOB, STEPS, WORK, run_attempt
from training import driver, patience
from training.backend import JobStatus
from training.checkpoints import Checkpoints
from training.driver import drive, followed
from training.event_text import describe
from training.events import AdapterPublished, AdapterStep, JobFailed, JobFinished, TrainingEvent
from training.job_end import JobResult
from training.job_reports import report
from training.job_store import JobStore
from training.service.outcome import Outcome


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.job_end.plot", lambda curves, title: b"")
    monkeypatch.setattr(driver, "POLL_S", 0.01)
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)


class HiccupStore(PassingStore):
    """Away for the next so many operations."""

    away_for = 0

    def before(self, *, is_write: bool) -> None:
        if self.away_for > 0:
            self.away_for -= 1
            raise StoreUnavailableError("away")


FOREVER = 10**9


def run(
    store: ObjectStore,
    fit: Callable[[int, int], str | None],
    seen: list[TrainingEvent] | None = None,
) -> JobResult:
    told = [] if seen is None else seen
    return drive(store, JOB, tuple(STEPS), WORK, 2, fit, told.append)


def trained(store: ObjectStore) -> Callable[[int, int], None]:
    return lambda number, workers: run_attempt(store, driver=number)


def events_of(store: ObjectStore) -> tuple[TrainingEvent, ...]:
    return JobStore(store, JOB).read_events().events


def test_who_follows_a_job_misses_nothing_while_the_store_is_away(local: ObjectStore) -> None:
    store = HiccupStore(local)
    seen: list[TrainingEvent] = []
    has_seen = threading.Event()

    def see(event: TrainingEvent) -> None:
        seen.append(event)
        has_seen.set()

    steps = [AdapterStep("a", n, 2, 1.0, 1.0, 1.0, 1.0) for n in (1, 2)]
    with followed(JobStore(store, JOB), see), JobStore(local, JOB).writer("worker-0") as tell:
        store.away_for = 3
        for step in steps:
            has_seen.clear()
            tell(step)
            tell.flush()
            assert has_seen.wait(30)
            store.away_for = 3
    assert seen == steps


def test_a_store_that_is_away_for_good_costs_a_follower_the_last_events_and_no_job(
    local: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = HiccupStore(local)
    with followed(JobStore(store, JOB), lambda event: None):
        store.away_for = FOREVER
    assert "the job's last events are not shown here" in caplog.text


def test_an_error_of_who_is_told_is_raised_at_the_end(local: ObjectStore) -> None:
    def see(event: TrainingEvent) -> None:
        raise ZeroDivisionError

    has_ended = False
    with pytest.raises(ZeroDivisionError), followed(JobStore(local, JOB), see):
        with JobStore(local, JOB).writer("worker-0") as tell:
            tell(AdapterPublished("a", "1" * 64, "latest"))
        has_ended = True
    assert has_ended


@pytest.mark.usefixtures("undurable")
def test_a_job_whose_adapters_are_published_ends_well_though_the_store_is_away_for_a_moment(
    local: ObjectStore,
) -> None:
    store = HiccupStore(local)

    def fit(number: int, workers: int) -> None:
        run_attempt(local, driver=number)
        store.away_for = 4

    seen: list[TrainingEvent] = []
    result = run(store, fit, seen)
    assert result.is_success and set(result.published) == set(STEPS)
    assert isinstance(events_of(local)[-1], JobFinished)
    assert sorted(seen, key=repr) == sorted(events_of(local), key=repr)
    assert not Checkpoints(local, JOB).finished.names()


@pytest.mark.usefixtures("undurable")
def test_files_that_cannot_be_removed_fail_no_job(
    local: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    class NoDelete(PassingStore):
        def delete(self, key: str) -> None:
            raise StoreUnavailableError("away")

    assert run(NoDelete(local), trained(local)).is_success
    assert "files of published adapters stay with the job" in caplog.text


def test_whatever_ends_the_driver_is_told(local: ObjectStore) -> None:
    def fit(number: int, workers: int) -> None:
        raise RuntimeError("no cluster\nat all")

    with pytest.raises(RuntimeError):
        run(local, fit)
    assert events_of(local)[-1] == JobFailed(JOB, "RuntimeError: no cluster")

    assert run(local, lambda number, workers: "worker 0: died").error == "worker 0: died"
    assert events_of(local)[-1] == JobFailed(JOB, "worker 0: died")
    assert report(JOB, events_of(local)).status is JobStatus.FAILED


@pytest.mark.usefixtures("undurable")
def test_of_two_drivers_the_earlier_one_ends_and_says_who_goes_on(local: ObjectStore) -> None:
    later_runs, earlier_ended = threading.Event(), threading.Event()

    def later_fit(number: int, workers: int) -> None:
        later_runs.set()
        assert earlier_ended.wait(30)
        run_attempt(local, driver=number)

    with ThreadPoolExecutor(1) as thread:
        later = []

        def earlier_fit(number: int, workers: int) -> str:
            later.append(thread.submit(run, local, later_fit))
            assert later_runs.wait(30)
            return "a worker of it could not commit"

        try:
            with pytest.raises(OverloadedError, match="another driver of the job 'job'"):
                run(local, earlier_fit)
            failed = next(event for event in events_of(local) if isinstance(event, JobFailed))
            assert failed.is_taken_over and "has taken over" in failed.reason
            assert "another driver" in describe(failed)
            outcome = Outcome()
            for event in events_of(local):
                outcome.see(event)
            assert outcome.failure is None, "the job itself has not failed"
            assert report(JOB, events_of(local)).status is JobStatus.RUNNING
        finally:
            earlier_ended.set()
        assert later[0].result().is_success


def test_a_driver_takes_over_though_a_worker_commits_at_the_same_moment(
    local: ObjectStore,
) -> None:
    class RacingStore(PassingStore):
        """A round is committed between each of the first reads of the commit and its replacement."""

        races = 3

        def get(self, key: str) -> StoredObject:
            found = super().get(key)
            if key.endswith("commit.json") and self.races:
                self.races -= 1
                old.commit(replace(first, round=3 - self.races))
            return found

    old = Checkpoints(local, JOB)
    first = old.begin(WORK.digest)
    assert Checkpoints(RacingStore(local), JOB).take_over(WORK.digest) == 1
    commit = Checkpoints(local, JOB).read(WORK.digest)
    assert commit is not None and (commit.round, commit.driver) == (3, 1), "and loses no round"


def test_a_driver_gives_signs_of_life_while_it_lives(
    local: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "ALIVE_EVERY_S", 0.01)
    store, job = HiccupStore(local), JobStore(local, JOB)
    assert job.alive_s() is None

    def fit(number: int, workers: int) -> str:
        first_s = until(lambda: job.alive_s())
        store.away_for = 2
        until(lambda: (job.alive_s() or 0.0) > first_s)
        return "enough"

    run(store, fit)
    last_s = job.alive_s()
    time.sleep(0.05)
    assert job.alive_s() == last_s, "and no longer"


def until(ask: Callable[[], float | bool | None]) -> float:
    deadline_s = time.monotonic() + 30
    while not (found := ask()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return found
