"""What was told of one adapter is read from its end, and no further back than somebody looks."""

from __future__ import annotations

from itertools import count, islice

import pytest

from storage.errors import AdapterCorruptError
from storage.object_store import ObjectStore
from tests.storage.passing_store import PassingStore
from training import job_store
from training.event_history import EventHistory
from training.events import AdapterEvaluated, AdapterPublished, JobStarted, TrainingEvent, told_us
from training.job_store import JobStore

OTHERS = 4


class CountingStore(PassingStore):
    """Counts bytes of what is read, and reads and listings."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.num_bytes = self.reads = 0

    def before(self, *, is_write: bool) -> None:
        self.reads += not is_write

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        data = super().get_range(key, start, stop)
        self.num_bytes += len(data)
        return data


def told(adapter: str, step: int) -> TrainingEvent:
    return AdapterEvaluated(adapter, step, 0.5)


@pytest.fixture
def counting(local: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    """A job of a hundred objects: `early` told 10 steps, `late` and others 600."""
    monkeypatch.setattr(job_store, "_OBJECT_BYTES", 4000)
    seconds = count(1_700_000_000)
    job = JobStore(local, "job")
    with (
        job.writer("driver", lambda: next(seconds)) as driver,
        job.writer("worker-0", lambda: next(seconds)) as tell,
    ):
        driver(JobStarted("job", ("early", "late"), 1))
        for step in range(600):
            if step < 10:
                tell(told("early", step))
            for other in range(OTHERS):
                tell(told(f"other-{other}", step))
            tell(told("late", step))
        tell(AdapterPublished("late", "f" * 64, "latest"))
    assert sum(1 for _ in local.list("jobs/job/events/")) > 60
    return CountingStore(local)


def test_the_newest_page_of_a_long_job_reads_its_end(counting: CountingStore) -> None:
    history = EventHistory(counting)
    newest = list(islice(history.back("job", "late"), 21))
    assert newest == [
        AdapterPublished("late", "f" * 64, "latest"),
        *(told("late", step) for step in range(599, 579, -1)),
    ]
    assert counting.num_bytes < 5 * 4000
    counting.num_bytes = 0
    assert list(islice(history.back("job", "late"), 5)) == newest[:5]
    assert counting.num_bytes <= 2 * 4000, "a poll reads the end, however long the job is"


def test_every_page_is_as_cheap_and_all_of_them_are_everything(counting: CountingStore) -> None:
    history = EventHistory(counting)
    seen: list[TrainingEvent] = []
    until_us = None
    while page := list(islice(history.back("job", "late", until_us), 50)):
        seen += page
        until_us = told_us(page[-1]) - 1
        assert counting.num_bytes < 15 * 4000
        counting.num_bytes = 0
    assert seen[1:] == [told("late", step) for step in range(599, -1, -1)]
    counting.num_bytes = 0
    deep = EventHistory(counting)  # of a process that read nothing of the job before
    assert list(islice(deep.back("job", "late", told_us(seen[-2])), 1)) == [told("late", 1)]
    assert counting.num_bytes < 15 * 4000


def test_an_adapter_that_ended_long_ago_is_looked_for_once(counting: CountingStore) -> None:
    history = EventHistory(counting)
    expected = [told("early", step) for step in range(9, -1, -1)]
    assert list(history.back("job", "early")) == expected
    counting.reads = counting.num_bytes = 0
    assert list(history.back("job", "early")) == expected
    assert counting.reads < 5 and counting.num_bytes < 3 * 4000


def test_what_is_told_later_is_read_though_the_object_was_read_before(local: ObjectStore) -> None:
    history, job = EventHistory(local), JobStore(local, "job")
    with job.writer("worker-0", lambda: 5.0) as tell:
        tell(told("b", 1))
        tell.flush()
        assert list(history.back("job", "a")) == []
        tell(told("a", 1))
        tell(told("a", 2))
        tell.flush()
        both = list(history.back("job", "a"))
    assert both == [told("a", 2), told("a", 1)]
    assert told_us(both[0]) > told_us(both[1]), "though the clock stood still"
    assert list(history.back("nobody", "a")) == []


def test_a_line_that_is_no_event_is_an_error_by_name(local: ObjectStore) -> None:
    local.put("jobs/job/events/worker-0-0000.jsonl", b'{"event": "surprise", "adapter": "a"}\n')
    with pytest.raises(AdapterCorruptError, match="events of worker-0"):
        list(EventHistory(local).back("job", "a"))
