"""A training job from this machine: handed to the cluster, then followed by its events."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cli.console import err
from cli.errors import CommandFailedError
from cli.interrupts import shielded
from cli.local_cluster import LocalCluster
from cli.training_progress import TrainingProgress
from deployments.settings import Settings
from storage.stores import open_store, open_store_to_read
from training.backend import JobBackend, JobInfo, JobStatus
from training.job_reports import cancel_job
from training.job_store import JobStore
from training.learning_curve import Curve
from training.spec import TrainingSpec

_POLL_S = 0.5
_ASK_EVERY_S = 2.0
_LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What became of a job: versions of what was published, reasons of what failed, by adapter; their curves."""

    job_id: str
    published: dict[str, str]
    failed: dict[str, str]
    curves: tuple[Curve, ...]
    seconds: float


def submit(
    spec: TrainingSpec, ray: LocalCluster | None, settings: Settings, job_id: str
) -> JobBackend:
    """Store the specification with its data and start the job. Raises OverloadedError when the cluster refuses."""
    from training.stored_spec import store_spec

    key = store_spec(open_store(settings.storage), spec, job_id)
    backend = job_backend(ray, settings)
    backend.submit(key, job_id)
    return backend


def job_backend(ray: LocalCluster | None, settings: Settings) -> JobBackend:
    """Where the settings say; else a Ray on this machine, which has this checkout already.

    Raises:
        CommandFailedError: it is to be this machine's, and there is none.
    """
    from training.backends import open_backend, runs_elsewhere

    if runs_elsewhere(settings):
        return open_backend(settings)
    if ray is None:
        raise CommandFailedError(
            "no cluster is running here that the job could be on; set training.job_address or training.backend"
        )
    ray.authenticate()
    return open_backend(settings, ray.dashboard_url)


def follow(backend: JobBackend, settings: Settings, job_id: str) -> TrainingResult:
    """Show a job until it ends.

    Raises:
        CommandFailedError: the job as a whole failed or was cancelled; says why.
    """
    job = JobStore(open_store_to_read(settings.storage), job_id)
    started_s = asked_s = time.monotonic()
    cursor, info = "", backend.get(job_id)
    with TrainingProgress(err) as progress:
        while True:
            if time.monotonic() - asked_s > _ASK_EVERY_S or progress.is_over:
                info, asked_s = backend.get(job_id), time.monotonic()
            # The page is read after the status: when that is final, this is all there is.
            page = job.read_events(cursor)
            cursor = page.next
            for event in page.events:
                progress.show(event)
            if info.status.is_final:
                break
            time.sleep(_POLL_S)
    _raise_if_broken(backend, info, progress)
    return TrainingResult(
        job_id,
        progress.published,
        progress.failed,
        progress.curves,
        time.monotonic() - started_s,
    )


def tell_it_goes_on(job_id: str) -> None:
    """To whoever stopped following it."""
    err.print(f"the job goes on; to stop it: flora jobs cancel {job_id}", soft_wrap=True)


def cancel(backend: JobBackend, settings: Settings, job_id: str) -> None:
    """Stop a job, whatever the person at the keyboard presses meanwhile."""
    with shielded(), err.status(f"cancelling {job_id}"):
        info = cancel_job(backend, open_store(settings.storage), job_id)
        while not info.status.is_final:
            time.sleep(_POLL_S)
            info = backend.get(job_id)
    err.print(f"the job {job_id}: {info.status.value}; what it published stays", soft_wrap=True)


def _raise_if_broken(backend: JobBackend, info: JobInfo, progress: TrainingProgress) -> None:
    if info.status is JobStatus.CANCELLED:
        raise CommandFailedError(f"the job {info.job_id} was cancelled")
    if info.status is JobStatus.FAILED and not progress.failed:
        reason = progress.failure
        if reason is None:
            reason = "the end of its log:\n" + "\n".join(
                list(backend.logs(info.job_id))[-_LOG_LINES:]
            )
        raise CommandFailedError(f"the job {info.job_id} failed: {reason}")
