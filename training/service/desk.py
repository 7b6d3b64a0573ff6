"""The desk that jobs of the API go over: looks at their files, puts them into batches, and tells what became of them.

Everything it knows lies in the store. A desk may die at any line, and the next one goes on: a batch is decided by the
records of its jobs, what it trains by the specification stored for it, which is written once; and starting it again is
no second start. Two desks at once do double work and no harm.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from storage.base_checkpoint import BaseFacts
from storage.errors import FloraError, InvalidRequestError
from storage.object_store import ObjectStore
from training.backend import JobBackend
from training.config import TrainingSettings
from training.service.batches import Batches
from training.service.batching import due_batches
from training.service.files import UploadedFiles
from training.service.job import Fault, FineTuningJob, FineTuningStatus, new_batch_id
from training.service.job_data import BadFileError, JobData
from training.service.job_figures import JobFigures
from training.service.records import JobRecords

_LOOKING_S = 2.0
"""How long files are looked at between two looks at running batches."""

_TIDY_EVERY_S = 600.0

_log = logging.getLogger(__name__)


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
        self._records = JobRecords(store)
        self._data = JobData(UploadedFiles(store, clock), read_base)
        self._batches = Batches(store, self._data, backend, settings, clock, on_published)
        self._settings = settings
        self._clock = clock
        self._tidied_s = -math.inf
        self.figures = JobFigures()

    def tick(self) -> bool:
        """Do all that can be done now. False when there is no job to see to."""
        if self._clock() >= self._tidied_s + _TIDY_EVERY_S:
            self._records.forget_lost_marks(self._base_id, self._clock())
            self._tidied_s = self._clock()
        jobs = self._records.open(self._base_id)
        self.figures.see(jobs)
        known = self._batches.see_to(jobs)
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
        known |= self._batches.see_to(begun)
        self._batches.keep(known)
        return bool(jobs)

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
            return self._fail(job, Fault.of(error))
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
        return self._records.change(job, lambda current: current.validated(self._clock()))

    def _assign(self, job: FineTuningJob, batch_id: str, count: int) -> FineTuningJob:
        return self._records.change(
            job, lambda current: current.assigned(batch_id, count, self._clock())
        )

    def _fail(self, job: FineTuningJob, fault: Fault) -> FineTuningJob:
        return self._records.change(job, lambda current: current.failed(fault, self._clock()))
