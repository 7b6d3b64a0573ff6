"""Training behind the API: files, records and events for its routes, and the thread that works at the desk."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from deployments.multipart import PartStart
from deployments.upload import Form, Uploads
from storage.errors import FloraError, InvalidRequestError
from storage.figures import Figures
from storage.object_store import ObjectStore
from training.config import TrainingSettings
from training.event_history import EventHistory
from training.events import TrainingEvent
from training.service.desk import Desk
from training.service.files import UploadedFiles
from training.service.job import FineTuningJob
from training.service.job_figures import JobFigures
from training.service.lease import Lease
from training.service.records import JobRecords, desk_folder

_BUSY_S = 1.0
_IDLE_S = 5.0
"""How often the desk looks for jobs: while there are some, and while there are none."""

_log = logging.getLogger(__name__)


def _only_file(part: PartStart) -> str:
    if part.name != "file":
        raise InvalidRequestError(f"there is no field {part.name!r}", param=part.name[:64])
    return part.name


FILE_FORM = Form(frozenset({"purpose"}), _only_file)


class TrainingService:
    """What the routes of files and fine-tuning stand on. `base` is where training finds the served base model.

    Args:
        make_desk: a desk for the jobs of the served base; raises our errors where jobs cannot run.
    """

    def __init__(
        self,
        store: ObjectStore,
        settings: TrainingSettings,
        base_id: str,
        base: str,
        make_desk: Callable[[], Desk],
    ) -> None:
        self.base = base
        self.files = UploadedFiles(store, time.time, settings.file_bytes_per_tenant)
        self.jobs_per_tenant = settings.jobs_per_tenant
        self.records = JobRecords(store)
        self._history = EventHistory(store)
        self.uploads = Uploads(settings.max_file_bytes, form=FILE_FORM)
        self._make_desk = make_desk
        self._lease = Lease(store, f"{desk_folder(base_id)}lease.json", uuid.uuid4().hex, time.time)
        self._figures = JobFigures()  # until there is a desk
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="training-desk", daemon=True)

    def events(self, job: FineTuningJob, until_us: int | None = None) -> Iterator[TrainingEvent]:
        """What was told of a job's training, newest first, from a time on. Blocks, also while it is gone through."""
        if job.batch is None:
            return iter(())
        return self._history.back(job.batch, job.name, until_us)

    def figures(self) -> Figures:
        """Of the jobs this process sees to; all zero while another does."""
        return self._figures.read()

    def follow(self) -> None:
        """Work at the desk whenever nobody else does, for the rest of the process or until `stop`."""
        self._thread.start()

    def nudge(self) -> None:
        """There is something to do at the desk."""
        self._news.set()

    def stop(self) -> None:
        self._stopped.set()
        self._news.set()
        self._thread.join()

    def _work(self) -> None:
        desk: Desk | None = None
        trouble = ""
        while not self._stopped.is_set():
            pause_s = _IDLE_S
            try:
                if not self._lease.is_held():
                    self._figures.leave()
                else:
                    desk = desk or self._make_desk()
                    self._figures = desk.figures
                    pause_s = _BUSY_S if desk.tick() else _IDLE_S
                trouble = ""
            except FloraError as error:
                if error.message != trouble:
                    _log.warning("training jobs wait: %s", error.message)
                trouble = error.message
            except Exception:
                # This thread must outlive anything that one job may bring about.
                _log.exception("training jobs wait")
            self._news.wait(pause_s)
            self._news.clear()
        try:
            self._lease.give_back()
        except FloraError as error:
            _log.warning("the desk is not given back: %s", error.message)
