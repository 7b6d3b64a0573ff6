"""What became of a job, from what was told of it."""

from __future__ import annotations

import pytest

from training.backend import JobStatus
from training.events import (
    AdapterPublished,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
)
from training.job_reports import report

STARTED = JobStarted("job", ("red",), 1)
FAILED = JobFailed("job", "SystemExit: 1")
CANCELLED = JobCancelled("job")
DONE = JobFinished("job", ("red",), ())


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], JobStatus.QUEUED),
        ([STARTED], JobStatus.RUNNING),
        ([STARTED, FAILED], JobStatus.FAILED),
        ([STARTED, FAILED, STARTED], JobStatus.RUNNING),
        ([STARTED, JobFailed("job", "another", is_taken_over=True)], JobStatus.RUNNING),
        ([STARTED, FAILED, CANCELLED], JobStatus.CANCELLED),
        ([STARTED, CANCELLED, FAILED], JobStatus.CANCELLED),
        ([STARTED, CANCELLED, STARTED], JobStatus.RUNNING),
        ([STARTED, AdapterPublished("red", "1", "latest"), DONE], JobStatus.SUCCEEDED),
        ([STARTED, DONE, CANCELLED], JobStatus.SUCCEEDED),
    ],
)
def test_the_last_word_holds_but_a_stopped_driver_is_no_failure(
    events: list[TrainingEvent], status: JobStatus
) -> None:
    told = report("job", events)
    assert told.status is status
    assert (told.error != "") == (status is JobStatus.FAILED)
