"""The desk that jobs of the API go over: looks at their files, puts them into batches, and tells what became of them.

Everything it knows lies in the store. A desk may die at any line, and the next one goes on: a batch is decided by the
records of its jobs, what it trains by the specification stored for it, which is written once; and starting it again is
no second start. Two desks at once do double work and no harm.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage.base_checkpoint import BaseFacts
from storage.errors import FloraError, InvalidRequestError, NotFoundError, SpecificationError
from storage.object_store import ObjectStore
from storage.registry import Registry
from training.backend import JobBackend, JobInfo, JobStatus
from training.config import TrainingSettings
from training.job_reports import cancel_job
from training.job_store import JobStore
from training.service.batching import due_batches
from training.service.files import UploadedFiles
from training.service.job import Fault, FineTuningJob, FineTuningStatus, new_batch_id
from training.service.job_data import BadFileError, JobData
from training.service.outcome import Outcome
from training.service.records import Change, JobRecords
from training.spec import TrainingSpec
from training.stored_spec import spec_key, store_spec, stored_adapters

_FAILED = "training_failed"
_UNEXPLAINED = "the training job ended without saying why; the server's log may"
_TAKEN = "an adapter of this name was made since; training a new version of it needs an admin key"
_LOOKING_S = 2.0
"""How long files are looked at between two looks at running batches."""

_log = logging.getLogger(__name__)


@dataclass
class _Followed:
    """What this desk has read of a batch."""

    adapters: frozenset[str]
    cursor: str = ""
    outcome: Outcome = field(default_factory=Outcome)
    stopped: set[str] = field(default_factory=set)


class Desk:
    """For the jobs of one base. One thread.

    Args:
        read_base: the facts of that base; slow, asked once.
        backend: where batches run.
        clock: seconds since the epoch.
        on_published: called before a job is said to have succeeded; must raise nothing.
    """

    def __init__(
        self,
        base_id: str,
        read_base: Callable[[], BaseFacts],
        store: ObjectStore,
        backend: JobBackend,
        settings: TrainingSettings,
        clock: Callable[[], float],
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        self._base_id = base_id
        self._store = store
        self._records = JobRecords(store)
        self._registry = Registry(store)
        self._data = JobData(UploadedFiles(store, clock), read_base)
        self._backend = backend
        self._settings = settings
        self._clock = clock
        self._on_published = on_published
        self._followed: dict[str, _Followed] = {}

    def tick(self) -> bool:
        """Do all that can be done now. False when there is no job to see to.

        One batch in trouble holds up no other: what it met is logged, and tried again next time.
        """
        jobs = self._records.open(self._base_id)
        known = self._see_to_all(jobs)
        for job in jobs:
            if job.batch is None and job.status.is_final:
                self._records.put_away(job)
        jobs = self._looked_at(jobs)
        begun = []
        for batch in due_batches(
            jobs,
            self._clock(),
            wait_s=self._settings.batch_wait_s,
            largest=self._settings.max_batch_adapters,
            most=self._settings.max_running_batches,
        ):
            batch_id = new_batch_id(self._clock())
            begun += [self._assign(job, batch_id, len(batch)) for job in batch]
        known |= self._see_to_all(begun)
        self._followed = {name: one for name, one in self._followed.items() if name in known}
        return bool(jobs)

    def _see_to_all(self, jobs: Iterable[FineTuningJob]) -> set[str]:
        """See to the batches of these jobs; their names."""
        batches: dict[str, list[FineTuningJob]] = {}
        for job in jobs:
            if job.batch is not None:
                batches.setdefault(job.batch, []).append(job)
        for batch_id, members in batches.items():
            try:
                self._see_to(batch_id, members)
            except FloraError as error:
                _log.warning("%s: %s", batch_id, error.message)
            except Exception:
                _log.exception("%s cannot be seen to", batch_id)
        return set(batches)

    def _looked_at(self, jobs: Sequence[FineTuningJob]) -> list[FineTuningJob]:
        """The jobs, some of those that wait for it validated: at least one, and no more when time is up."""
        end_s = time.monotonic() + _LOOKING_S
        looked: list[FineTuningJob] = []
        is_late = False
        for job in jobs:
            is_new = job.status is FineTuningStatus.VALIDATING
            looked.append(self._validated(job) if is_new and not is_late else job)
            is_late = is_late or (is_new and time.monotonic() >= end_s)
        return looked

    def _validated(self, job: FineTuningJob) -> FineTuningJob:
        try:
            self._data.check(job)
        except InvalidRequestError as error:
            return self._fail(job, _fault(error))
        except FloraError as error:
            # Nothing about the job: it is looked at again.
            _log.warning("%s: %s", job.job_id, error.message)
            return job
        except (OSError, MemoryError):
            # This machine's trouble; no job is to blame.
            _log.exception("%s cannot be looked at now", job.job_id)
            return job
        except Exception:
            # No file may hold up the jobs behind it.
            _log.exception("%s cannot be looked at", job.job_id)
            fault = Fault(code=BadFileError.code, message="its files cannot be read")
            return self._fail(job, fault)
        return self._change(job, lambda current: current.validated(self._clock()))

    # A batch.

    def _assign(self, job: FineTuningJob, batch_id: str, count: int) -> FineTuningJob:
        return self._change(job, lambda current: current.assigned(batch_id, count, self._clock()))

    def _see_to(self, batch_id: str, members: Sequence[FineTuningJob]) -> None:
        if all(job.status.is_final for job in members):
            self._end(batch_id, members)
            return
        batch = self._batch(batch_id, members)
        if batch is None:
            return
        for job in members:
            if job.name not in batch.adapters:
                # Assigned by a desk that did not know the batch was on its way already.
                self._return(job, "its batch began without it; it is queued again")
        members = [job for job in members if job.name in batch.adapters]
        if all(job.status.is_final for job in members):
            self._end(batch_id, members)
            return
        info = self._info(batch_id, members)
        job_store = JobStore(self._store, batch_id)
        for job in members:
            if job.status is FineTuningStatus.CANCELLED and job.name not in batch.stopped:
                job_store.stop(job.name)
                batch.stopped.add(job.name)
        # The events are read after the status: when that is final, this is all there is.
        page = job_store.read_events(batch.cursor)
        batch.cursor = page.next
        for event in page.events:
            batch.outcome.see(event)
        members = [self._settled(job, batch.outcome) for job in members]
        if info.status.is_final:
            self._conclude(batch_id, members, info, batch.outcome)

    def _batch(self, batch_id: str, members: Sequence[FineTuningJob]) -> _Followed | None:
        """What is known of a batch, whose specification is stored now; None when nobody is left to be trained."""
        if batch_id not in self._followed:
            if not self._store.exists(spec_key(batch_id)):
                self._store_batch(batch_id, [job for job in members if not job.status.is_final])
            try:
                self._followed[batch_id] = _Followed(stored_adapters(self._store, batch_id))
            except SpecificationError:
                return None
        return self._followed[batch_id]

    def _store_batch(self, batch_id: str, members: Sequence[FineTuningJob]) -> None:
        asked = members[0].request
        with tempfile.TemporaryDirectory() as folder:
            adapters = []
            for job in members:
                if not job.may_replace and self._registry.aliases(job.adapter):
                    self._fail(job, Fault(code="name_taken", message=_TAKEN, param="suffix"))
                    continue
                try:
                    adapters.append(self._data.adapter(job, Path(folder) / job.job_id))
                except InvalidRequestError as error:  # a file was deleted since it was looked at
                    self._fail(job, _fault(error))
            if not adapters:
                return
            spec = TrainingSpec(
                base=asked.base,
                base_id=asked.base_id,
                tenant=asked.tenant,
                dtype=asked.dtype,
                checkpoint_every_steps=self._settings.batch_checkpoint_every_steps,
                adapters=tuple(adapters),
            )
            store_spec(self._store, spec, batch_id)

    def _info(self, batch_id: str, members: Sequence[FineTuningJob]) -> JobInfo:
        """How the batch is, started if it has not been."""
        if all(job.attempts == 0 for job in members):
            return self._start(batch_id, members, attempt=1)
        try:
            return self._backend.get(batch_id)
        except NotFoundError:
            # Its cluster is gone.
            return JobInfo(batch_id, JobStatus.FAILED, "the cluster does not know the job any more")

    def _start(self, batch_id: str, members: Iterable[FineTuningJob], attempt: int) -> JobInfo:
        members = [self._records.get(job.request.tenant, job.job_id) for job in members]
        if all(job.status.is_final for job in members):  # cancelled since they were read
            return JobInfo(batch_id, JobStatus.QUEUED)
        # First the deed, which may be done twice: an attempt that the cluster refused is none.
        info = self._backend.submit(spec_key(batch_id), batch_id)
        for job in members:
            self._change(job, lambda current: current.attempted(attempt))
        return info

    def _settled(self, job: FineTuningJob, outcome: Outcome) -> FineTuningJob:
        """What the events say of one job."""
        name, now_s = job.name, self._clock()
        if name in outcome.started and job.status is FineTuningStatus.QUEUED:
            job = self._change(job, lambda current: current.running(now_s))
        if name in outcome.published and not job.status.is_final:
            version, tokens = outcome.published[name], outcome.tokens(name)
            self._on_published()
            job = self._change(job, lambda current: current.succeeded(version, tokens, now_s))
        elif name in outcome.failed:
            job = self._fail(job, Fault(code=_FAILED, message=outcome.failed[name]))
        return job

    def _conclude(
        self,
        batch_id: str,
        members: Sequence[FineTuningJob],
        info: JobInfo,
        outcome: Outcome,
    ) -> None:
        """The training job has ended; what shall be of the jobs it said nothing of."""
        left = [job for job in members if not job.status.is_final]
        if not left:
            return
        now_s = self._clock()
        if info.status is JobStatus.CANCELLED:
            message = "the training job was cancelled on its cluster"
            for job in left:
                self._change(job, lambda current: current.cancelled(now_s, message))
            return
        has_a_say = outcome.failure is not None or info.status is JobStatus.SUCCEEDED
        attempt = max(job.attempts for job in left)
        if not has_a_say and attempt < self._settings.max_attempts:
            self._start(batch_id, left, attempt + 1)
            return
        if outcome.failure is None:
            # With the driver's output in it, which is for whoever runs the cluster.
            _log.error("%s ended as %s: %s", batch_id, info.status.value, info.message)
        reason = outcome.failure or _UNEXPLAINED
        if len(members) > 1:
            # One of them may be to blame for all; alone each is tried once.
            for job in left:
                self._return(job, f"its batch failed ({reason}); it is tried alone", is_alone=True)
            return
        for job in left:
            self._fail(job, Fault(code=_FAILED, message=reason))

    def _end(self, batch_id: str, members: Sequence[FineTuningJob]) -> None:
        """Nobody waits for anything of the batch any more."""
        job_store = JobStore(self._store, batch_id)
        cancelled = [job for job in members if job.status is FineTuningStatus.CANCELLED]
        for job in cancelled:
            job_store.stop(job.name)
        if len(cancelled) == len(members):
            with suppress(NotFoundError):  # never begun, or gone with its cluster
                cancel_job(self._backend, self._store, batch_id)
        for job in members:
            self._records.put_away(job)

    def _return(self, job: FineTuningJob, reason: str, *, is_alone: bool = False) -> None:
        batch_id, now_s = job.batch or "", self._clock()
        self._change(
            job, lambda current: current.returned(batch_id, now_s, reason, is_alone=is_alone)
        )

    def _fail(self, job: FineTuningJob, fault: Fault) -> FineTuningJob:
        return self._change(job, lambda current: current.failed(fault, self._clock()))

    def _change(self, job: FineTuningJob, change: Change) -> FineTuningJob:
        return job if job.status.is_final else self._records.change(job, change)


def _fault(error: InvalidRequestError) -> Fault:
    return Fault(code=error.code, message=error.message, param=error.param)
