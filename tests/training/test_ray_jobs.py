"""Real Ray: a run that loses its worker, and a job sent to the job server."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from cli.local_cluster import LocalCluster
from storage.adapter_rows import AdapterRows
from storage.config import StorageSettings
from storage.errors import NotFoundError
from storage.formats.peft import read_peft
from storage.identity import AdapterName, AdapterVersion
from storage.registry import Registry
from storage.stores import open_store
from tests.training.tiny_jobs import largest_difference
from training.adapter_run import AdapterRun
from training.backend import JobInfo, JobStatus
from training.config import TrainingSettings
from training.events import (
    AdapterStarted,
    AdapterStep,
    JobFinished,
    JobStarted,
    TrainingEvent,
    WorkerStarted,
)
from training.frozen_base import FrozenBase
from training.job_plan import plan_job
from training.job_settings import JobSettings
from training.job_store import JobStore
from training.ray_jobs import RayJobBackend
from training.ray_train import run_training
from training.spec import AdapterSpec, TrainingSpec
from training.spec_file import read_spec
from training.stored_spec import store_spec
from training.trainer import MultiAdapterTrainer
from workers.models.loading import load_base

JOB_TIMEOUT_S = 300


@pytest.fixture
def settings(tmp_path: Path) -> JobSettings:
    return JobSettings(
        storage=StorageSettings(registry=str(tmp_path / "registry")),
        training=TrainingSettings(
            storage_path=tmp_path / "jobs", cpus_per_worker=0.5, threads=1, max_failures=2
        ),
    )


@pytest.fixture
def spec(tiny_llama_dir: Path, tmp_path: Path) -> TrainingSpec:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"the fox {n}"},
                {"role": "assistant", "content": "jumps over"},
            ]
        }
        for n in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"""
base: {tiny_llama_dir}
base_id: tiny
checkpoint_every_steps: 4
defaults: {{data: data.jsonl, batch_size: 2}}
adapters:
  - {{name: short, rank: 1, steps: 3}}
  - {{name: long, rank: 4, steps: 12}}
"""
    )
    return read_spec(path)


def published_rows(settings: JobSettings, name: str) -> tuple[AdapterVersion, AdapterRows]:
    registry = Registry(open_store(settings.storage))
    adapter = AdapterName("default", name)
    version = registry.resolve(adapter)
    entries = registry.manifest(adapter, version).content.files
    return version, read_peft({path: registry.read_file(one) for path, one in entries.items()}).rows


def rows_without_ray(spec: TrainingSpec) -> dict[str, AdapterRows]:
    plan = plan_job(spec, TrainingSettings())
    base = load_base(spec.base, torch.float32, torch.device("cpu"))
    rows: dict[str, AdapterRows] = {}

    def publish(adapter: AdapterSpec, made: AdapterRows) -> AdapterVersion:
        rows[adapter.name] = made
        return AdapterVersion("f" * 64)

    MultiAdapterTrainer(
        FrozenBase.adopt(base, max_tokens=512),
        [AdapterRun(one, plan.data[one.name], plan.num_steps[one.name]) for one in spec.adapters],
        publish=publish,
        on_event=lambda event: None,
    ).run()
    return rows


class KillsTheWorkerOnce:
    """Follows a run, and at a step between two checkpoints kills -9 the process that trains."""

    def __init__(self, at_step: int) -> None:
        self.seen: list[TrainingEvent] = []
        self.has_killed = False
        self._at_step = at_step

    def __call__(self, event: TrainingEvent) -> None:
        self.seen.append(event)
        if isinstance(event, AdapterStep) and event.step >= self._at_step and not self.has_killed:
            (worker,) = (event for event in self.seen if isinstance(event, WorkerStarted))
            os.kill(worker.pid, signal.SIGKILL)
            self.has_killed = True


def test_a_job_that_loses_its_worker_ends_as_an_undisturbed_one(
    ray_session: LocalCluster, settings: JobSettings, spec: TrainingSpec
) -> None:
    long = spec.adapters[1].model_copy(update={"steps": 90})
    spec = spec.model_copy(
        update={"checkpoint_every_steps": 20, "adapters": (spec.adapters[0], long)}
    )
    watcher = KillsTheWorkerOnce(at_step=50)
    result = run_training(spec, settings, watcher, job_id="job-1")

    assert watcher.has_killed
    starts = [e for e in watcher.seen if isinstance(e, AdapterStarted) and e.adapter == "long"]
    assert [start.step for start in starts] in ([0, 20], [0, 40])
    assert result.is_success
    expected = rows_without_ray(spec)
    for name in ("short", "long"):
        version, rows = published_rows(settings, name)
        assert result.published[name] == version
        assert largest_difference(rows, expected[name]) <= 1e-6
    told = JobStore(open_store(settings.storage), "job-1").read_events().events
    assert told == tuple(watcher.seen)
    assert isinstance(told[0], JobStarted) and isinstance(told[-1], JobFinished)


def ended(backend: RayJobBackend, job_id: str) -> JobInfo:
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    while not (info := backend.get(job_id)).status.is_final:
        assert time.monotonic() < deadline_s, list(backend.logs(job_id))
        time.sleep(0.2)
    return info


def test_a_submitted_job_trains_on_two_workers_and_publishes(
    ray_session: LocalCluster, settings: JobSettings, spec: TrainingSpec
) -> None:
    two_workers = settings.training.model_copy(update={"num_workers": 2})
    settings = JobSettings(storage=settings.storage, training=two_workers)
    backend = RayJobBackend(ray_session.dashboard_url, settings)
    key = store_spec(open_store(settings.storage), spec, "job-2")
    first = backend.submit(key, "job-2")
    assert not first.status.is_final
    assert backend.submit(key, "job-2").job_id == "job-2", "the same job, not a second one"

    info = ended(backend, "job-2")
    log = list(backend.logs("job-2"))
    assert info.status is JobStatus.SUCCEEDED, log
    assert any("published 2 of 2 adapters" in line for line in log)
    told = JobStore(open_store(settings.storage), "job-2").read_events().events
    assert isinstance(told[0], JobStarted) and told[0].workers == 2
    expected = rows_without_ray(spec)
    for name in ("short", "long"):
        assert largest_difference(published_rows(settings, name)[1], expected[name]) <= 1e-6


def test_a_job_with_a_wrong_specification_fails_and_says_why(
    ray_session: LocalCluster, settings: JobSettings
) -> None:
    backend = RayJobBackend(ray_session.dashboard_url, settings)
    backend.submit("jobs/none/spec.json", "job-3")
    assert ended(backend, "job-3").status is JobStatus.FAILED
    assert any("there is no such specification" in line for line in backend.logs("job-3"))


def test_a_job_can_be_cancelled_and_an_unknown_one_is_told(
    ray_session: LocalCluster, settings: JobSettings, spec: TrainingSpec
) -> None:
    backend = RayJobBackend(ray_session.dashboard_url, settings)
    for ask in (backend.get, backend.cancel, lambda job_id: list(backend.logs(job_id))):
        with pytest.raises(NotFoundError, match="no training job 'nobody'"):
            ask("nobody")
    endless = spec.adapters[1].model_copy(update={"steps": 10**6})
    key = store_spec(
        open_store(settings.storage), spec.model_copy(update={"adapters": (endless,)}), "job-4"
    )
    backend.submit(key, "job-4")
    backend.cancel("job-4")
    assert ended(backend, "job-4").status is JobStatus.CANCELLED
    assert backend.cancel("job-4").status is JobStatus.CANCELLED
