"""What became of training jobs, from the store alone: also after the job, its driver and its cluster are gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from storage.index import parallel
from storage.object_store import ObjectStore
from training.backend import JobBackend, JobInfo, JobStatus
from training.events import (
    AdapterFailed,
    AdapterPublished,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
)
from training.job_store import ALIVE, ALIVE_EVERY_S, DRIVER, JobStore

LOST_AFTER_S = 5 * ALIVE_EVERY_S


@dataclass(frozen=True)
class JobReport:
    """A job as its events tell it. A driver that was killed told no end: `status` then stays running.

    Attributes:
        began_s: its first sign, in seconds since the epoch; `told_s` its last one; `alive_s` its driver's last sign of
            life, None when that gives none or was not asked for.
        published: adapter → version; `failed`: adapter → reason. Empty strings where only the driver was asked.
    """

    job_id: str
    began_s: float = 0.0
    told_s: float = 0.0
    status: JobStatus = JobStatus.QUEUED
    adapters: tuple[str, ...] = ()
    published: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    error: str = ""
    alive_s: float | None = None

    def lost_for_s(self, now_s: float) -> float:
        """How long there was no sign of a driver that should give some; 0 when it is not taken for dead."""
        if self.status is not JobStatus.RUNNING or self.alive_s is None:
            return 0.0
        silent_s = now_s - max(self.alive_s, self.told_s)
        return silent_s if silent_s > LOST_AFTER_S else 0.0

    def after(self, event: TrainingEvent) -> JobReport:
        told = replace(self, told_s=max(self.told_s, event.at_s))
        match event:
            case JobStarted():
                names = tuple(dict.fromkeys((*self.adapters, *event.adapters)))
                return replace(told, status=JobStatus.RUNNING, adapters=names, error="")
            case AdapterPublished():
                return replace(
                    told,
                    published={**self.published, event.adapter: event.version},
                    failed=_without(self.failed, event.adapter),
                )
            case AdapterFailed():
                return replace(
                    told,
                    failed={**self.failed, event.adapter: event.reason},
                    published=_without(self.published, event.adapter),
                )
            case JobFinished():
                return replace(
                    told,
                    status=JobStatus.FAILED if event.failed else JobStatus.SUCCEEDED,
                    published={**dict.fromkeys(event.published, ""), **self.published},
                    failed={**dict.fromkeys(event.failed, ""), **self.failed},
                )
            # A driver that is stopped may still say that it failed, before the word of who stopped it or after.
            case JobFailed() if not event.is_taken_over and self.status is not JobStatus.CANCELLED:
                return replace(told, status=JobStatus.FAILED, error=event.reason)
            case JobCancelled() if self.status is not JobStatus.SUCCEEDED:
                return replace(told, status=JobStatus.CANCELLED, error="")
        return told


def report(job_id: str, events: Iterable[TrainingEvent], began_s: float = 0.0) -> JobReport:
    """A job's report from its events, in their order."""
    made = JobReport(job_id, began_s, began_s)
    for event in events:
        made = replace(made, began_s=min(made.began_s or event.at_s, event.at_s))
        made = made.after(event)
    return made


def newest_jobs(store: ObjectStore, limit: int) -> list[JobReport]:
    """So many jobs, newest first, from what their drivers told, and when anything of them was last written."""
    began: dict[str, float] = {}
    written: dict[str, float] = {}
    alive: dict[str, float] = {}
    for one in store.list("jobs/"):
        job_id, _, name = one.key.removeprefix("jobs/").partition("/")
        if name == ALIVE:
            alive[job_id] = one.modified_s
        began[job_id] = min(began.get(job_id, one.modified_s), one.modified_s)
        written[job_id] = max(written.get(job_id, 0.0), one.modified_s)
    newest = sorted(began, key=lambda job_id: (-began[job_id], job_id))[:limit]

    def read(job_id: str) -> JobReport:
        events = JobStore(store, job_id).read_events(writer=DRIVER).events
        told = report(job_id, events, began[job_id])
        told_s = max(told.told_s, written[job_id])
        return replace(told, told_s=told_s, alive_s=alive.get(job_id))

    return parallel(read, newest)


def exists(store: ObjectStore, job_id: str) -> bool:
    """Whether anything is known of a job."""
    return next(iter(store.list(JobStore(store, job_id).folder)), None) is not None


def cancel_job(backend: JobBackend, store: ObjectStore, job_id: str) -> JobInfo:
    """Stop a job, and write down that somebody did. Raises as `JobBackend.cancel`."""
    info = backend.cancel(job_id)
    if info.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        with JobStore(store, job_id).writer(DRIVER) as tell:
            tell(JobCancelled(job_id))
    return info


def _without(values: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in values.items() if key != name}
