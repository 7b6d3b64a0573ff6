"""Real Ray, and a registry in S3: jobs that lose a worker or their driver, and what the job server is told."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.job_submission import JobSubmissionClient

from cli.local_cluster import LocalCluster
from storage.adapter_rows import AdapterRows
from storage.config import StorageSettings
from storage.errors import NotFoundError
from storage.formats.peft import read_peft
from storage.identity import AdapterName, AdapterVersion
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.s3_server import S3Server
from tests.training.tiny_jobs import largest_difference
from training.adapter_run import AdapterRun
from training.backend import JobBackend, JobInfo, JobStatus
from training.backends import open_backend
from training.config import TrainingSettings
from training.events import (
    AdapterStarted,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
    WorkerStarted,
)
from training.frozen_base import FrozenBase
from training.job_plan import plan_job
from training.job_settings import JobSettings
from training.job_store import LOSS_PICTURE, JobStore
from training.ray_jobs import RayJobBackend
from training.ray_train import run_training
from training.sharing import share_out
from training.spec import AdapterSpec, TrainingSpec
from training.spec_file import read_spec
from training.stored_spec import store_spec
from training.trainer import MultiAdapterTrainer
from workers.models.loading import load_base

JOB_TIMEOUT_S = 300


@pytest.fixture
def settings(s3_settings: StorageSettings, tmp_path: Path) -> JobSettings:
    return JobSettings(
        storage=s3_settings,
        training=TrainingSettings(
            storage_path=tmp_path / "scratch", cpus_per_worker=0.5, threads=1, max_failures=2
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
dtype: float32
checkpoint_every_steps: 4
deterministic: true
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
    adapters = {adapter.name: adapter for adapter in spec.adapters}
    rows: dict[str, AdapterRows] = {}

    def publish(adapter: AdapterSpec, made: AdapterRows) -> AdapterVersion:
        rows[adapter.name] = made
        return AdapterVersion("f" * 64)

    MultiAdapterTrainer(
        FrozenBase.adopt(base, max_tokens=512),
        [
            AdapterRun(adapters[name], plan.data[name], plan.num_steps[name])
            for name in share_out(plan.costs, 1)[0]
        ],
        publish=publish,
        on_event=lambda event: None,
    ).run()
    return rows


def events_of(settings: JobSettings, job_id: str) -> tuple[TrainingEvent, ...]:
    return JobStore(open_store(settings.storage), job_id).read_events().events


def starts_of(events: Sequence[TrainingEvent], adapter: str) -> list[int]:
    return [e.step for e in events if isinstance(e, AdapterStarted) and e.adapter == adapter]


COMMIT, WORKER_EVENTS = "commit.json", "events/worker-0"
MOST_WRITES = 14


class KillsOnce:
    """Kills -9 a process just before the last of these writes to the store, which come in this order among others."""

    def __init__(self, kill: Callable[[], None], *keys: str) -> None:
        self.has_killed = False
        self._kill, self._keys = kill, list(keys)

    def __call__(self, method: str, path: str) -> None:
        if method == "PUT" and self._keys and self._keys[0] in path:
            self._keys.pop(0)
            if not self._keys:
                self.has_killed = True
                self._kill()


def test_a_job_that_loses_its_worker_ends_as_an_undisturbed_one(
    ray_session: LocalCluster, s3_api: S3Server, settings: JobSettings, spec: TrainingSpec
) -> None:
    """It asked for two workers where there is room for one, and began with that."""
    seen: list[TrainingEvent] = []

    def kill_the_worker() -> None:
        (worker,) = (e for e in events_of(settings, "job-1") if isinstance(e, WorkerStarted))
        os.kill(worker.pid, signal.SIGKILL)

    # A driver and an attempt begin with a commit, each round ends with one; events are told by the clock.
    s3_api.before = killer = KillsOnce(kill_the_worker, *[COMMIT] * 3, WORKER_EVENTS)
    more_than_half = 0.6 * ray.cluster_resources()["CPU"]
    training = settings.training.model_copy(
        update={"num_workers": 2, "min_workers": 1, "cpus_per_worker": more_than_half}
    )
    crowded = JobSettings(storage=settings.storage, training=training)
    result = run_training(spec, crowded, seen.append, job_id="job-1")

    assert killer.has_killed
    assert starts_of(seen, "long") == [0, 4]
    assert starts_of(seen, "short") == [0], "what was published is not trained again"
    assert result.is_success
    expected = rows_without_ray(spec)
    for name in ("short", "long"):
        version, rows = published_rows(settings, name)
        assert result.published[name] == version
        assert largest_difference(rows, expected[name]) == 0.0
    told = events_of(settings, "job-1")
    assert sorted(told, key=repr) == sorted(seen, key=repr), "each event was told once"
    assert isinstance(told[0], JobStarted) and isinstance(told[-1], JobFinished)
    picture = JobStore(open_store(settings.storage), "job-1").get_file(LOSS_PICTURE)
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(("workers", "bound"), [(1, 0.0), (2, 1e-6)])
def test_a_worker_may_be_killed_at_any_write(
    ray_session: LocalCluster,
    s3_api: S3Server,
    settings: JobSettings,
    spec: TrainingSpec,
    workers: int,
    bound: float,
) -> None:
    """A random one after the first events: states, commits, events, parts of what is published.

    Of two workers the other waits for the dead one. Adapters apart are in other batches than together.
    """
    writes = int(os.environ.get("FLORA_TEST_KILL_AT", random.randrange(MOST_WRITES)))
    print(f"to see this again: FLORA_TEST_KILL_AT={writes}")

    killed: list[int] = []

    def kill_the_worker() -> None:
        started = [e.pid for e in events_of(settings, "job-2") if isinstance(e, WorkerStarted)]
        killed.append(started[writes % len(started)])
        os.kill(killed[0], signal.SIGKILL)

    s3_api.before = KillsOnce(kill_the_worker, WORKER_EVENTS, *[""] * (writes + 1))
    training = settings.training.model_copy(update={"num_workers": workers})
    sized = JobSettings(storage=settings.storage, training=training)
    result = run_training(spec, sized, lambda event: None, job_id="job-2")

    assert killed and result.is_success
    started = [e for e in events_of(settings, "job-2") if isinstance(e, WorkerStarted)]
    assert [e.workers for e in started] == [workers] * 2 * workers, "all began once more"
    expected = rows_without_ray(spec)
    for name in ("short", "long"):
        version, rows = published_rows(settings, name)
        assert result.published[name] == version
        assert largest_difference(rows, expected[name]) <= bound


def ended(backend: JobBackend, job_id: str) -> JobInfo:
    deadline_s = time.monotonic() + JOB_TIMEOUT_S
    while not (info := backend.get(job_id)).status.is_final:
        assert time.monotonic() < deadline_s, list(backend.logs(job_id))
        time.sleep(0.2)
    return info


def test_a_submitted_job_whose_driver_is_killed_goes_on_with_another_number_of_workers(
    ray_session: LocalCluster, s3_api: S3Server, settings: JobSettings, spec: TrainingSpec
) -> None:
    def with_workers(count: int) -> RayJobBackend:
        training = settings.training.model_copy(update={"num_workers": count})
        sized = JobSettings(storage=settings.storage, training=training)
        return RayJobBackend(ray_session.dashboard_url, sized)

    job_id = f"job-{uuid.uuid4().hex[:8]}"

    def kill_the_driver() -> None:
        workers = [e.pid for e in events_of(settings, job_id) if isinstance(e, WorkerStarted)]
        assert len(workers) == 2
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command[1:3] == ["-m", "training.job"] and job_id in command:
                process.kill()
        while any(psutil.pid_exists(pid) for pid in workers):  # Ray ends them after their driver
            time.sleep(0.05)

    s3_api.before = killer = KillsOnce(kill_the_driver, *[COMMIT] * 4)
    key = store_spec(open_store(settings.storage), spec, job_id)
    first = with_workers(2).submit(key, job_id)
    assert not first.status.is_final
    assert with_workers(2).submit(key, job_id).job_id == job_id, "the same job, not a second one"
    assert ended(with_workers(2), job_id).status is JobStatus.FAILED
    assert killer.has_killed

    again = with_workers(1)
    again.submit(key, job_id)
    info = ended(again, job_id)
    log = list(again.logs(job_id))
    assert info.status is JobStatus.SUCCEEDED, log
    assert any("published 2 of 2 adapters" in line for line in log)
    told = events_of(settings, job_id)
    assert [e.workers for e in told if isinstance(e, JobStarted)] == [2, 1]
    assert starts_of(told, "short") == [0], "what was published is not trained again"
    assert starts_of(told, "long") in ([0, 4], [0, 8])
    expected = rows_without_ray(spec)
    for name in ("short", "long"):
        assert largest_difference(published_rows(settings, name)[1], expected[name]) <= 1e-6


def test_a_job_with_a_wrong_specification_fails_and_says_why_and_may_be_tried_again(
    ray_session: LocalCluster, settings: JobSettings
) -> None:
    """On a cluster that the settings name by its address: the job brings its code, and no path of this machine."""
    training = settings.training.model_copy(update={"job_address": ray_session.dashboard_url})
    backend = open_backend(JobSettings(storage=settings.storage, training=training))
    backend.submit("jobs/none/spec.json", "job-3")
    assert ended(backend, "job-3").status is JobStatus.FAILED
    assert any("there is no such specification" in line for line in backend.logs("job-3"))
    (refused,) = JobStore(open_store(settings.storage), "job-3").read_events().events
    assert isinstance(refused, JobFailed) and "no such specification" in refused.reason
    # Ray takes no name twice; the job is the same one all the same.
    again = backend.submit("jobs/none/spec.json", "job-3")
    assert again.job_id == "job-3" and not again.status.is_final
    assert backend.cancel("job-3").job_id == "job-3"
    assert ended(backend, "job-3").status.is_final
    there = JobSubmissionClient(ray_session.dashboard_url)
    assert there.get_job_info("job-3--2")
    environment = there.get_job_info("job-3").runtime_env
    assert environment["working_dir"].startswith("gcs://")
    assert not any("STORAGE_PATH" in name for name in environment["env_vars"])


def test_a_job_can_be_cancelled_and_an_unknown_one_is_told(
    ray_session: LocalCluster,
    settings: JobSettings,
    spec: TrainingSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a shell or a pod has for another cluster is not where these jobs go.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
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
