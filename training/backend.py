"""Where a training job runs, behind one protocol.

Back ends: `RayJobBackend` (a Ray cluster's job address, local or remote), `KubernetesJobBackend` (a RayJob object).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.errors import NotFoundError, OverloadedError
from training.stored_spec import STORED


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


class ClusterAwayError(OverloadedError):
    """The cluster that trains does not answer, or not now."""

    code = "cluster_unavailable"


class ClusterRefusedError(OverloadedError):
    """The cluster that trains answers, and takes no job until whoever runs it changes something.

    The message is for whoever that is: it may name what is the cluster's own.
    """

    code = "cluster_refused"


def entrypoint(spec_key: str, job_id: str) -> str:
    """The shell command that is a job, where its cluster is."""
    return shlex.join(["python", "-m", "training.job", f"{STORED}{spec_key}", "--job-id", job_id])


def unknown_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"there is no training job {job_id!r}", param="job_id")


class JobBackend(Protocol):
    """Every method raises ClusterAwayError and ClusterRefusedError, StoreUnavailableError never."""

    def submit(self, spec_key: str, job_id: str) -> JobInfo:
        """Start the job whose specification lies in the registry's store under `spec_key`.

        `job_id` is the idempotency key: a job that is queued, runs, succeeded or was cancelled is left as it is. For
        one whose last attempt failed or died another attempt begins, which goes on from the job's checkpoint.
        """

    def get(self, job_id: str) -> JobInfo:
        """The job's last attempt. Raises NotFoundError for an unknown job."""

    def cancel(self, job_id: str) -> JobInfo:
        """Stop the job; no error when it has ended already. Raises NotFoundError."""

    def logs(self, job_id: str) -> Iterator[str]:
        """The output of the last attempt's driver so far. Raises NotFoundError."""
