"""One job as a Ray Train run, from its driver: what each worker does is `training/ray_worker.py`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from storage.stores import open_store
from training.config import TrainingSettings
from training.driver import drive
from training.events import EventSink
from training.job_end import JobResult, telling_line
from training.job_plan import plan_job
from training.job_settings import JobAreas, job_directory
from training.ray_worker import WorkerTask, train_share
from training.rounds import Work
from training.spec import TrainingSpec
from workers.large_pages import kept_memory

# A lost worker is noticed at once; this bounds the wait for one that is only slow.
_LONGEST_ROUND_S = 24 * 3600
# A worker's report waits until Ray Train has looked at the one before: by its own choice, every two seconds.
_LOOK_AT_WORKERS_S = "0.25"

logger = logging.getLogger("flora.training")


def run_training(
    spec: TrainingSpec, settings: JobAreas, on_event: EventSink, *, job_id: str
) -> JobResult:
    """Run a job and wait for it, on the Ray this process is connected to; else on `RAY_ADDRESS`, or one of its own.

    A job of the same id that was cut off goes on from its last checkpoint.

    Args:
        on_event: told every event as it happens, from a thread of its own.
        job_id: names the job's directory; a valid name as of `storage.identity`.

    Raises:
        SpecificationError, InvalidRequestError: found before any worker starts.
        StoreUnavailableError: not for a moment only.
        OverloadedError: the job was started once more meanwhile; what becomes of it, that one tells.
    """
    plan = plan_job(spec, settings.training, settings.storage)
    work = Work(plan.digest(), plan.costs, plan.num_steps, spec.checkpoint_every_steps)

    def fit(driver: int, workers: int) -> str | None:
        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        task = WorkerTask(plan, work, settings.storage, settings.training, job_id, driver)
        return _fit(task, workers, job_directory(settings, job_id))

    store = open_store(settings.storage)
    num_workers = settings.training.num_workers
    return drive(store, job_id, tuple(plan.data), work, num_workers, fit, on_event)


def _fit(task: WorkerTask, workers: int, scratch: Path) -> str | None:
    """Run to the end; returns why it did not get there.

    Ray Train wants a storage path of its own for the checkpoints it is given. It is given none: a path on one machine
    would be another one for workers elsewhere, and for S3 it would need a second client with credentials, endpoint
    and failures of its own, whose uploads are not atomic. Ours go to the registry's store by the client the registry
    uses, and a resume needs nothing but the job's id. So `scratch` holds only Ray Train's marker files, on whichever
    machine; it may be empty, or gone, the next time.
    """
    settings = task.training
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _LOOK_AT_WORKERS_S)
    trainer = TorchTrainer(
        train_share,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="gloo", timeout_s=_LONGEST_ROUND_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(settings, workers),
            elastic_resize_monitor_interval_s=settings.look_for_room_s,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": settings.cpus_per_worker,
                **({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=scratch.name,
            storage_path=str(scratch.parent),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": kept_memory()},
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        logger.error("%s", error)
        return _reason(error)
    return None


def _num_workers(settings: TrainingSettings, workers: int) -> int | tuple[int, int]:
    """Fixed, or for Ray to choose as the cluster has room: at the start, after a loss, and when room appears."""
    fewest = min(settings.min_workers or workers, workers)
    return workers if fewest == workers else (fewest, workers)


def _reason(error: ray.train.TrainingFailedError) -> str:
    """What the first lost worker died of, in one line; the log has the tracebacks."""
    failures = getattr(error, "worker_failures", {})
    texts = [f"worker {rank}: {telling_line(str(failures[rank]))}" for rank in sorted(failures)]
    return texts[0] if texts else telling_line(str(error))
