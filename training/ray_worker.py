"""A Ray Train worker: it holds the whole frozen base and trains its own share of the adapters.

There is no gradient traffic between workers; they only meet at the end of a round (`training/rounds.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray.train
import ray.train.torch
import torch

from storage.config import StorageSettings
from storage.registry import Registry
from storage.stores import open_store
from training.adapter_run import AdapterRun
from training.checkpoints import Checkpoints
from training.config import TrainingSettings
from training.events import EventSink
from training.job_memory import FittedBase
from training.job_plan import JobPlan
from training.job_store import JobStore
from training.publishing import JobPublisher
from training.rounds import Build, Work, train_in_rounds
from training.trainer import MultiAdapterTrainer, Publish
from workers.models.loading import find_base, load_base

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerTask:
    """Everything one job's workers need, as plain data."""

    plan: JobPlan
    work: Work
    storage: StorageSettings
    training: TrainingSettings
    job_id: str
    driver: int


class RayPeers:
    """`Peers` of a Ray Train worker: they talk over torch's process group, and to Ray by `report`."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.size: int = context.get_world_size()

    def from_first(self, value: T | None) -> T:
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def gather(self, value: T) -> Sequence[T]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def report(self, round_: int) -> None:
        ray.train.report({"round": round_})


def train_share(config: Mapping[str, Any]) -> None:
    """The function Ray Train runs on every worker."""
    task: WorkerTask = config["task"]
    cores = len(os.sched_getaffinity(0)) // ray.train.get_context().get_local_world_size()
    torch.set_num_threads(task.training.threads or max(1, cores))
    if task.plan.spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on a GPU
        torch.use_deterministic_algorithms(True)
    peers = RayPeers()
    store = open_store(task.storage)
    job = JobStore(store, task.job_id)
    checkpoints = Checkpoints(store, task.job_id, task.driver)
    publisher = JobPublisher(
        Registry(store),
        task.plan.base,
        checkpoints,
        tenant=task.plan.spec.tenant,
        job_id=task.job_id,
        max_bytes=task.storage.max_adapter_bytes,
    )
    with job.writer(f"worker-{peers.rank}") as tell:
        build = _trainers(task, publisher, tell)
        train_in_rounds(task.work, peers, job, checkpoints, build, publisher.again, tell)


def _trainers(task: WorkerTask, publish: Publish, tell: EventSink) -> Build:
    """Trainers one after another, over one base that is loaded when the first is wanted."""
    plan = task.plan
    specs = {adapter.name: adapter for adapter in plan.spec.adapters}
    loaded: list[FittedBase] = []

    def build(share: Sequence[str]) -> MultiAdapterTrainer:
        if not loaded:
            loaded.append(_fitted_base(task))
        limits = loaded[0].fit([specs[name] for name in share], plan.data)
        return MultiAdapterTrainer(
            loaded[0].base,
            [AdapterRun(specs[name], plan.data[name], plan.num_steps[name]) for name in share],
            publish=publish,
            on_event=tell,
            max_resident=limits.max_resident if limits else None,
            max_step_tokens=limits.max_step_tokens if limits else task.training.max_step_tokens,
            keeps_broken=plan.spec.deterministic,
        )

    return build


def _fitted_base(task: WorkerTask) -> FittedBase:
    spec = task.plan.spec
    base = find_base(spec.base, task.storage)
    loaded = load_base(str(base), getattr(torch, spec.dtype), ray.train.torch.get_device())
    return FittedBase.adopt(loaded, spec.adapters, task.training)
