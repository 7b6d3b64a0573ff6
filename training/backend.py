"""Where a training job runs, behind one protocol.

Back ends: `RayJobBackend` (a Ray cluster's job address, local or remote). A Kubernetes one makes a RayJob object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class JobInfo:
    job_id: str
    status: JobStatus
    message: str = ""


class JobBackend(Protocol):
    """Raises `StoreUnavailableError` never; `OverloadedError` when the cluster cannot be reached."""

    def submit(self, spec_key: str, job_id: str) -> JobInfo:
        """Start the job whose specification lies in the registry's store under `spec_key`.

        `job_id` is the idempotency key: submitting it again returns the job that exists.
        """

    def get(self, job_id: str) -> JobInfo:
        """Raises InvalidRequestError for an unknown job."""

    def cancel(self, job_id: str) -> JobInfo:
        """Stop the job; no error when it has ended already."""

    def logs(self, job_id: str) -> Iterator[str]:
        """The driver's output so far."""
