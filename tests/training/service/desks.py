"""A desk over a real store, a clock that is moved by hand, and a cluster that trains when it is told to."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from storage.base_checkpoint import BaseFacts
from storage.errors import NotFoundError
from storage.object_store import ObjectStore
from training.backend import ClusterAwayError, ClusterRefusedError, JobInfo, JobStatus
from training.config import TrainingSettings
from training.events import (
    AdapterFailed,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
)
from training.job_store import JobStore
from training.service.desk import Desk
from training.service.files import UploadedFiles
from training.service.job import FineTuningJob, FineTuningRequest
from training.service.records import JobRecords
from training.stored_spec import stored_adapters

BASE = BaseFacts("tiny", "0" * 64, {"layers.0.q_proj": (8, 8), "layers.0.v_proj": (8, 4)})
LINES = [{"prompt": f"{n}", "completion": "yes"} for n in range(4)]
VERSION = "f" * 64


class Clock:
    now_s = 1_760_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Cluster:
    """A `JobBackend` in memory. `submitted` has every attempt that was really begun."""

    store: ObjectStore
    infos: dict[str, JobInfo] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    is_up: bool = True
    refusal: str = ""
    asked: int = 0

    def submit(self, spec_key: str, job_id: str) -> JobInfo:
        self._check()
        if self.refusal:
            raise ClusterRefusedError(self.refusal)
        known = self.infos.get(job_id)
        if known is None or known.status is JobStatus.FAILED:
            self.submitted.append(job_id)
            self.infos[job_id] = JobInfo(job_id, JobStatus.RUNNING)
        return self.infos[job_id]

    def get(self, job_id: str) -> JobInfo:
        self._check()
        if job_id not in self.infos:
            raise NotFoundError(job_id)
        return self.infos[job_id]

    def cancel(self, job_id: str) -> JobInfo:
        self._end(job_id, JobStatus.CANCELLED)
        return self.get(job_id)

    def logs(self, job_id: str) -> Iterator[str]:
        yield from ()

    def _check(self) -> None:
        self.asked += 1
        if not self.is_up:
            raise ClusterAwayError("nobody answers at 10.0.0.1")

    def _end(self, job_id: str, status: JobStatus, message: str = "") -> None:
        self.infos[job_id] = replace(self.get(job_id), status=status, message=message)

    # What its jobs do.

    def tell(self, job_id: str, *events: TrainingEvent) -> None:
        with JobStore(self.store, job_id).writer("worker") as writer:
            for event in events:
                writer(event)

    def begin(self, job_id: str) -> None:
        names = sorted(stored_adapters(self.store, job_id))
        self.tell(job_id, JobStarted(job_id, tuple(names), 1), *map(_started, names))

    def train(self, job_id: str, *names: str, fails: str = "") -> None:
        """Two steps of 10 tokens, then published, or failed."""
        for name in names:
            steps = [AdapterStep(name, n, 2, 1.0 / n, 1.0, 1e-3, 9.0, tokens=10) for n in (1, 2)]
            end = (
                AdapterFailed(name, 2, fails)
                if fails
                else AdapterPublished(name, VERSION, "latest")
            )
            self.tell(job_id, *steps, end)

    def finish(self, job_id: str) -> None:
        self.tell(job_id, JobFinished(job_id, (), ()))
        self._end(job_id, JobStatus.SUCCEEDED)

    def refuse(self, job_id: str, reason: str) -> None:
        self.tell(job_id, JobFailed(job_id, reason))
        self._end(job_id, JobStatus.FAILED, "exit code 2")

    def die(self, job_id: str) -> None:
        self._end(job_id, JobStatus.FAILED, "the driver was killed")


def _started(name: str) -> AdapterStarted:
    return AdapterStarted(name, "lora", 4, 0, 2, 4, 0, 0)


class World:
    """Several desks may work in it, over one store and one cluster."""

    def __init__(self, store: ObjectStore, **settings: object) -> None:
        self.clock = Clock()
        self.store = store
        self.cluster = Cluster(store)
        self.records = JobRecords(store)
        self.files = UploadedFiles(store, self.clock)
        self.settings = TrainingSettings.model_validate({"batch_wait_s": 5.0, **settings})
        self.desk = self.new_desk()

    def new_desk(self) -> Desk:
        return Desk("tiny", lambda: BASE, self.store, self.cluster, self.settings, self.clock)

    def upload(self, tenant: str = "default", lines: object = None, name: str = "d.jsonl") -> str:
        text = lines if isinstance(lines, str) else "\n".join(map(json.dumps, LINES))
        return self.files.add(tenant, name, io.BytesIO(text.encode())).file_id

    def create(
        self, suffix: str | None = None, tenant: str = "default", **fields: object
    ) -> FineTuningJob:
        self.clock.now_s += 0.01
        values: dict[str, object] = {
            "tenant": tenant,
            "base": "/bases/tiny",
            "base_id": "tiny",
            "training_file": fields.pop("training_file", None) or self.upload(tenant),
            "suffix": suffix,
            "seed": 1,
            "adapter": {"rank": 4, "family": "lora"},
            "may_replace": True,
            **fields,
        }
        return self.records.create(FineTuningRequest.model_validate(values), self.clock())

    def tick(self, *seconds: float) -> None:
        """A tick after each of these pauses; at once without one."""
        for pause_s in seconds or (0.0,):
            self.clock.now_s += pause_s
            self.desk.tick()

    def now(self, job: FineTuningJob) -> FineTuningJob:
        return self.records.get(job.request.tenant, job.job_id)
