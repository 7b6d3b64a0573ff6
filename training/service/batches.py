"""Batches of jobs: started as training jobs, followed by their events, and told apart into what became of each job.

What a cluster will not take or does not answer costs a job nothing but time: the job is told of it once, whoever runs
the cluster reads the reason in the log, and the pauses between two tries grow.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage.errors import FloraError, InvalidRequestError, NotFoundError, SpecificationError
from storage.object_store import ObjectStore
from storage.registry import Registry
from training.backend import (
    ClusterAwayError,
    ClusterRefusedError,
    JobBackend,
    JobInfo,
    JobStatus,
)
from training.config import TrainingSettings
from training.job_reports import cancel_job
from training.job_store import JobStore
from training.service.job import Fault, FineTuningJob, FineTuningStatus
from training.service.job_data import JobData
from training.service.outcome import Outcome
from training.service.pauses import Pauses
from training.service.records import JobRecords
from training.spec import TrainingSpec
from training.stored_spec import spec_key, store_spec, stored_adapters

_FAILED = "training_failed"
_UNEXPLAINED = "the training job ended without saying why; the server's log may"
_TAKEN = "an adapter of this name was made since; training a new version of it needs an admin key"
_REFUSED = (
    "the cluster refused to begin the job; the operator's log says why. It stays queued, and is tried again from time "
    "to time"
)
_AWAY = "the cluster that trains cannot be reached; the job stays queued, and is tried again"

_log = logging.getLogger(__name__)


@dataclass
class _Followed:
    """What was read of a batch."""

    adapters: frozenset[str]
    cursor: str = ""
    outcome: Outcome = field(default_factory=Outcome)
    stopped: set[str] = field(default_factory=set)


class Batches:
    """The batches of one desk. One thread.

    Args:
        backend: where batches run.
        clock: seconds since the epoch.
        on_published: called before a job is said to have succeeded; must raise nothing.
    """

    def __init__(
        self,
        store: ObjectStore,
        data: JobData,
        backend: JobBackend,
        settings: TrainingSettings,
        clock: Callable[[], float],
        on_published: Callable[[], None],
    ) -> None:
        self._store = store
        self._records = JobRecords(store)
        self._registry = Registry(store)
        self._data = data
        self._backend = backend
        self._settings = settings
        self._clock = clock
        self._on_published = on_published
        self._followed: dict[str, _Followed] = {}
        self._pauses = Pauses()

    def see_to(self, jobs: Iterable[FineTuningJob]) -> set[str]:
        """Do all that can be done now for the batches of these jobs; their names.

        One batch in trouble holds up no other: what it met is logged, and tried again next time or after a pause.
        """
        batches: dict[str, list[FineTuningJob]] = {}
        for job in jobs:
            if job.batch is not None:
                batches.setdefault(job.batch, []).append(job)
        for batch_id, members in batches.items():
            if not self._pauses.is_due(batch_id, self._clock()):
                continue
            try:
                self._see_to(batch_id, members)
            except ClusterRefusedError as error:
                _log.error("%s: %s", batch_id, error.message)
                self._pauses.begin(batch_id, self._clock(), is_lasting=True)
                self._tell(members, _REFUSED)
            except ClusterAwayError as error:
                _log.warning("%s: %s", batch_id, error.message)
                self._pauses.begin(batch_id, self._clock(), is_lasting=False)
                self._tell(members, _AWAY)
            except FloraError as error:
                _log.warning("%s: %s", batch_id, error.message)
            except Exception:
                _log.exception("%s cannot be seen to", batch_id)
            else:
                self._pauses.end(batch_id)
        return set(batches)

    def keep(self, batch_ids: set[str]) -> None:
        """Forget what was read of all others."""
        self._followed = {name: one for name, one in self._followed.items() if name in batch_ids}
        self._pauses.keep(batch_ids)

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
                    self._fail(job, Fault.of(error))
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
            self._records.change(job, lambda current: current.attempted(attempt))
        return info

    def _settled(self, job: FineTuningJob, outcome: Outcome) -> FineTuningJob:
        """What the events say of one job."""
        name, now_s = job.name, self._clock()
        if name in outcome.started and job.status is FineTuningStatus.QUEUED:
            job = self._records.change(job, lambda current: current.running(now_s))
        if name in outcome.published and not job.status.is_final:
            version, tokens = outcome.published[name], outcome.tokens(name)
            self._on_published()
            job = self._records.change(
                job, lambda current: current.succeeded(version, tokens, now_s)
            )
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
                self._records.change(job, lambda current: current.cancelled(now_s, message))
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
        self._records.change(
            job, lambda current: current.returned(batch_id, now_s, reason, is_alone=is_alone)
        )

    def _tell(self, members: Iterable[FineTuningJob], message: str) -> None:
        """Those whose batch did not begin, once each."""
        now_s = self._clock()
        for job in members:
            try:
                self._records.change(job, lambda current: current.held_up(message, now_s))
            except FloraError as error:
                _log.warning("%s is not told why it waits: %s", job.job_id, error.message)

    def _fail(self, job: FineTuningJob, fault: Fault) -> FineTuningJob:
        return self._records.change(job, lambda current: current.failed(fault, self._clock()))
