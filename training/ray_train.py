"""One job as a Ray Train run: each worker holds the whole frozen base and trains its own share of the adapters.

There is no gradient traffic between workers; they only meet in `report`, which is a barrier, so every worker reports
every round. A round's checkpoint has one file per adapter, so a run may go on with another number of workers.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from storage.base_checkpoint import BaseFacts
from storage.config import StorageSettings
from storage.errors import StoreUnavailableError
from storage.registry import Registry
from storage.stores import open_store
from training.adapter_run import AdapterData, AdapterRun
from training.config import TrainingSettings
from training.events import (
    AdapterFailed,
    AdapterPublished,
    EventSink,
    JobFailed,
    JobFinished,
    JobStarted,
    WorkerStarted,
)
from training.frozen_base import FrozenBase
from training.job_memory import trainer_limits
from training.job_plan import JobPlan, plan_job
from training.job_settings import JobAreas, job_directory
from training.job_store import JobStore
from training.publishing import publisher
from training.spec import TrainingSpec
from training.trainer import MultiAdapterTrainer
from workers.models.loading import find_base, load_base

_POLL_S = 1.0

logger = logging.getLogger("flora.training")


@dataclass(frozen=True)
class JobResult:
    """How a job ended: versions of what was published, reasons of what failed, by adapter.

    `error` says why the job as a whole stopped, if it did.
    """

    published: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_success(self) -> bool:
        return self.error is None and not self.failed


@dataclass(frozen=True)
class WorkerTask:
    """Everything one job's workers need, as plain data. The share of worker w is `shares[w]`."""

    spec: TrainingSpec
    base: BaseFacts
    data: Mapping[str, AdapterData]
    num_steps: Mapping[str, int]
    shares: tuple[tuple[str, ...], ...]
    storage: StorageSettings
    training: TrainingSettings
    job_id: str


def run_training(
    spec: TrainingSpec, settings: JobAreas, on_event: EventSink, *, job_id: str
) -> JobResult:
    """Run a job and wait for it, on the Ray this process is connected to; else on `RAY_ADDRESS`, or one of its own.

    A job of the same id that was cut off goes on from its last checkpoint.

    Args:
        on_event: told every event as it happens, from a thread of its own.
        job_id: names the job's directory; a valid name as of `storage.identity`.

    Raises:
        SpecificationError, InvalidRequestError, StoreUnavailableError: found before any worker starts.
    """
    directory = job_directory(settings, job_id)
    job = JobStore(open_store(settings.storage), job_id)
    plan = plan_job(spec, settings.training, settings.storage)
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    with _followed(job, on_event), job.writer("driver") as tell:
        tell(JobStarted(job_id, tuple(plan.data), len(plan.shares)))
        error = _fit(_task(plan, settings, job_id), settings.training, directory)
        result = _result(job, error)
        if error is None:
            tell(JobFinished(job_id, tuple(result.published), tuple(result.failed)))
        else:
            tell(JobFailed(job_id, error))
    return result


def _task(plan: JobPlan, settings: JobAreas, job_id: str) -> WorkerTask:
    return WorkerTask(
        spec=plan.spec,
        base=plan.base,
        data=plan.data,
        num_steps=plan.num_steps,
        shares=plan.shares,
        storage=settings.storage,
        training=settings.training,
        job_id=job_id,
    )


def _fit(task: WorkerTask, settings: TrainingSettings, directory: Path) -> str | None:
    """Run to the end; returns why it did not get there."""
    trainer = TorchTrainer(
        _train_share,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=len(task.shares),
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": settings.cpus_per_worker,
                **({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        logger.error("%s", error)
        return _reason(error)
    return None


def _reason(error: ray.train.TrainingFailedError) -> str:
    """What the first lost worker died of, in one line; the log has the tracebacks."""
    failures = getattr(error, "worker_failures", {})
    texts = [f"worker {rank}: {_telling_line(str(failures[rank]))}" for rank in sorted(failures)]
    return texts[0] if texts else _telling_line(str(error))


def _telling_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _result(job: JobStore, error: str | None) -> JobResult:
    """The events are the job's memory: what was told last of an adapter holds, also after a resume."""
    published: dict[str, str] = {}
    failed: dict[str, str] = {}
    for event in job.read_events().events:
        if isinstance(event, AdapterPublished):
            published[event.adapter] = event.version
            failed.pop(event.adapter, None)
        elif isinstance(event, AdapterFailed):
            failed[event.adapter] = event.reason
            published.pop(event.adapter, None)
    return JobResult(published, failed, error)


@contextmanager
def _followed(job: JobStore, on_event: EventSink) -> Iterator[None]:
    """Tell `on_event` what is told while the block runs, to the last event.

    An error of `on_event` ends the telling, not the block; it is raised at the end.
    """
    done = threading.Event()

    def follow(cursor: str) -> None:
        is_last = False
        while not is_last:
            is_last = done.wait(_POLL_S)
            page = job.read_events(cursor)
            cursor = page.next
            for event in page.events:
                on_event(event)

    with ThreadPoolExecutor(1, thread_name_prefix="training-events") as thread:
        followed = thread.submit(follow, job.read_events().next)
        try:
            yield
        finally:
            done.set()
        followed.result()


def _train_share(config: Mapping[str, Any]) -> None:
    """The function Ray Train runs on every worker."""
    task: WorkerTask = config["task"]
    context = ray.train.get_context()
    cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
    torch.set_num_threads(task.training.threads or max(1, cores))
    rank = context.get_world_rank()
    share = task.shares[rank]
    job = JobStore(open_store(task.storage), task.job_id)
    with job.writer(f"worker-{rank}") as tell:
        tell(WorkerStarted(rank, len(task.shares), socket.gethostname(), os.getpid(), share))
        trainer = _trainer(task, share, tell)
        done = _restore(trainer)
        trainer.start()
        while not _all_done(trainer):
            _stop_cancelled(trainer, job)
            for _ in range(task.spec.checkpoint_every_steps):
                trainer.step()
            tell.flush()
            done += 1
            _report(trainer, done)


def _all_done(trainer: MultiAdapterTrainer) -> bool:
    """Whether all workers' adapters are over; every worker asks before every round, and all hear the same."""
    left = torch.tensor(float(not trainer.is_done))
    torch.distributed.all_reduce(left)
    return left.item() == 0


def _stop_cancelled(trainer: MultiAdapterTrainer, job: JobStore) -> None:
    with suppress(StoreUnavailableError):  # it is looked for again at the next round
        for adapter in job.stopped():
            trainer.stop(adapter, "it was cancelled")


def _trainer(task: WorkerTask, share: tuple[str, ...], tell: EventSink) -> MultiAdapterTrainer:
    device = ray.train.torch.get_device()
    adapters = [adapter for adapter in task.spec.adapters if adapter.name in share]
    base = find_base(task.spec.base, task.storage)
    loaded = load_base(str(base), getattr(torch, task.spec.dtype), device)
    limits = trainer_limits(
        loaded.model.config, adapters, task.data, loaded.model.dtype, task.training
    )
    return MultiAdapterTrainer(
        FrozenBase.adopt(loaded, max_tokens=max(one.sequence_length for one in adapters)),
        [AdapterRun(one, task.data[one.name], task.num_steps[one.name]) for one in adapters],
        publish=publisher(
            Registry(open_store(task.storage)),
            task.base,
            tenant=task.spec.tenant,
            job_id=task.job_id,
            max_bytes=task.storage.max_adapter_bytes,
        ),
        on_event=tell,
        max_resident=limits.max_resident if limits else None,
        max_step_tokens=limits.max_step_tokens if limits else task.training.max_step_tokens,
    )


def _report(trainer: MultiAdapterTrainer, done: int) -> None:
    """Save this worker's adapters as round `done`, and wait for the others."""
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(trainer.runs):
            state = {"round": done, **trainer.state_of(number)}
            torch.save(state, Path(folder) / f"{run.name}.pt")
        ray.train.report({"round": done}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _restore(trainer: MultiAdapterTrainer) -> int:
    """Take up the last checkpoint, if there is one; returns the rounds that are done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    done = 0
    with checkpoint.as_directory() as folder:
        for number, run in enumerate(trainer.runs):
            state = torch.load(Path(folder) / f"{run.name}.pt", weights_only=True)
            trainer.restore(number, state)
            done = state["round"]
    return done
