"""What is made of a job's events when it ends."""

from __future__ import annotations

import pytest

from storage.errors import StoreUnavailableError
from storage.object_store import ObjectNotFoundError, ObjectStore
from tests.storage.passing_store import PassingStore
from training.events import AdapterFailed, AdapterPublished, AdapterStep
from training.job_end import job_result, keep_picture, telling_line
from training.job_store import LOSS_PICTURE, JobStore

PNG = b"\x89PNG\r\n"


def steps(count: int) -> list[AdapterStep]:
    return [AdapterStep("a", n + 1, count, 2.0 / (n + 1), 1.0, 1e-3, 9.0) for n in range(count)]


def test_the_last_word_for_an_adapter_counts() -> None:
    result = job_result(
        [
            AdapterPublished("a", "1" * 64, "latest"),
            AdapterFailed("b", 3, "it broke"),
            AdapterFailed("a", 4, "it broke too"),
            AdapterPublished("b", "2" * 64, "latest"),
        ],
        None,
    )
    assert (result.published, result.failed) == ({"b": "2" * 64}, {"a": "it broke too"})
    assert not result.is_success
    assert job_result([AdapterPublished("a", "1" * 64, "latest")], None).is_success
    assert not job_result([AdapterPublished("a", "1" * 64, "latest")], "no room").is_success


def test_a_job_leaves_a_picture_of_its_losses(local: ObjectStore) -> None:
    job = JobStore(local, "job")
    keep_picture(job, "job", steps(5))
    first = job.get_file(LOSS_PICTURE)
    assert first.startswith(PNG)
    keep_picture(job, "job", steps(9))
    assert job.get_file(LOSS_PICTURE).startswith(PNG) and job.get_file(LOSS_PICTURE) != first


class AwayStore(PassingStore):
    def before(self, *, is_write: bool) -> None:
        raise StoreUnavailableError("away")


def test_no_job_fails_for_its_picture(
    local: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_picture(JobStore(AwayStore(local), "job"), "job", steps(1))
    monkeypatch.setattr("training.job_end.plot", lambda curves, title: 1 / 0)
    keep_picture(JobStore(local, "job"), "job", steps(1))
    assert caplog.text.count("there is no picture of the losses") == 2
    with pytest.raises(ObjectNotFoundError):
        JobStore(local, "job").get_file(LOSS_PICTURE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no room\non any node", "no room"),
        ("Traceback (most recent call last):\n  File ...\nOSError: gone\n", "OSError: gone"),
        (" \n", "it gave no reason"),
        ("", "it gave no reason"),
    ],
)
def test_of_an_error_one_line_is_told(text: str, says: str) -> None:
    assert telling_line(text) == says
