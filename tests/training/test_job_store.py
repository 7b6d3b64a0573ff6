"""A job's events are readable while they are written and ever after, each once, from a directory and from S3."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import pytest

from storage.errors import AdapterCorruptError, InvalidRequestError, StoreUnavailableError
from storage.object_store import ObjectNotFoundError, ObjectStore
from tests.storage.passing_store import PassingStore
from training import job_store
from training.events import AdapterEvaluated, JobFinished, JobStarted, TrainingEvent
from training.job_store import JobStore

JOB = JobStarted("job", ("a", "b"), 2)


def told(adapter: str, step: int) -> TrainingEvent:
    return AdapterEvaluated(adapter, step, 0.5)


def ticks(start: float) -> Callable[[], float]:
    steps = count()
    return lambda: start + next(steps)


class CountingStore(PassingStore):
    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.reads = self.writes = 0

    def before(self, *, is_write: bool) -> None:
        self.writes += is_write
        self.reads += not is_write


class AwayStore(PassingStore):
    is_away = False

    def before(self, *, is_write: bool) -> None:
        if self.is_away:
            raise StoreUnavailableError("away")


def test_what_several_processes_tell_is_read_once_each_in_its_order(store: ObjectStore) -> None:
    job = JobStore(store, "job")
    assert job.read_events().events == ()
    with job.writer("driver", ticks(0)) as driver, job.writer("worker-0", ticks(0.5)) as worker:
        driver(JOB)
        driver.flush()
        worker(told("a", 1))
        worker(told("a", 2))
        worker.flush()
        first = job.read_events()
        assert first.events == (JOB, told("a", 1), told("a", 2))
        assert [event.at_s for event in first.events] == [0, 0.5, 1.5]
        assert job.read_events(first.next) == job_store.EventPage((), first.next)
        worker(told("a", 3))
        driver(end := JobFinished("job", (), ()))
    second = job.read_events(first.next)
    assert second.events == (end, told("a", 3)), "by their clocks"
    again = JobStore(store, "job").read_events().events
    assert again == (JOB, told("a", 1), end, told("a", 2), told("a", 3))


def test_a_follower_of_a_long_job_asks_once_to_see_that_nothing_is_new(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "_OBJECT_BYTES", 1000)
    counting = CountingStore(store)
    job = JobStore(counting, "job")
    seen: list[TrainingEvent] = []
    cursor = ""
    with job.writer("worker-0") as tell:
        for step in range(100):
            tell(told("a", step))
            if step % 7 == 0:
                tell.flush()
                page = job.read_events(cursor)
                seen.extend(page.events)
                cursor = page.next
    page = job.read_events(cursor)
    assert [*seen, *page.events] == [told("a", step) for step in range(100)]
    assert len({info.key for info in store.list("jobs/job/events/")}) > 5
    assert len(page.next) < 60, "a cursor does not grow with the job"
    counting.reads = 0
    assert job.read_events(page.next).events == ()
    assert counting.reads == 1


def test_a_line_longer_than_an_object_is_kept_whole(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "_OBJECT_BYTES", 300)
    long = JobStarted("job", tuple(f"adapter-{n}" for n in range(100)), 1)
    events = (told("a", 1), long, told("a", 2))
    with JobStore(store, "job").writer("driver") as tell:
        for event in events:
            tell(event)
    assert JobStore(store, "job").read_events().events == events


def test_events_reach_the_store_soon_without_anybody_asking(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "FLUSH_EVERY_S", 0.02)
    job = JobStore(store, "job")
    with job.writer("driver") as tell:
        tell(JOB)
        deadline_s = time.monotonic() + 30
        while job.read_events().events != (JOB,):
            assert time.monotonic() < deadline_s


def test_events_wait_while_the_store_is_away(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = AwayStore(store)
    with JobStore(away, "job").writer("driver") as tell:
        away.is_away = True
        tell(JOB)
        with pytest.raises(StoreUnavailableError):
            tell.flush()
        away.is_away = False
    assert JobStore(store, "job").read_events().events == (JOB,)


def test_a_writers_last_words_wait_for_a_store_that_is_away_for_a_moment(
    local: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = AwayStore(local)

    def come_back(seconds: float) -> None:
        away.is_away = False

    monkeypatch.setattr("training.patience.time.sleep", come_back)
    with JobStore(away, "job").writer("driver") as tell:
        tell(JOB)
        away.is_away = True
    assert JobStore(local, "job").read_events().events == (JOB,)


def test_a_process_that_comes_back_under_its_name_overwrites_nothing(store: ObjectStore) -> None:
    job = JobStore(store, "job")
    for step in (1, 2):
        with job.writer("worker-0") as tell:
            tell(told("a", step))
    assert job.read_events().events == (told("a", 1), told("a", 2))


def test_a_files_last_content_counts(store: ObjectStore) -> None:
    job = JobStore(store, "job")
    with pytest.raises(ObjectNotFoundError):
        job.get_file("loss.png")
    job.put_file("loss.png", b"old")
    job.put_file("loss.png", b"new")
    assert job.get_file("loss.png") == b"new"


@pytest.mark.parametrize("cursor", ["x", "[]", '{"a": 1}', '{"a": ["b", "c"]}'])
def test_what_is_not_a_cursor_or_an_id_is_refused(local: ObjectStore, cursor: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a cursor"):
        JobStore(local, "job").read_events(cursor)
    with pytest.raises(InvalidRequestError, match="not a valid name"):
        JobStore(local, "../job")


def test_a_line_that_is_no_event_is_an_error_by_name(local: ObjectStore) -> None:
    local.put("jobs/job/events/worker-0-0000.jsonl", b'{"event": "surprise"}\n')
    with pytest.raises(AdapterCorruptError, match="events of worker-0"):
        JobStore(local, "job").read_events()
