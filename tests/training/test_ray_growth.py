"""Workers come to a job that is under way, when the cluster gets another machine. On a Ray of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from cli.local_cluster import LocalCluster, start_cluster
from storage.config import StorageSettings
from tests.conftest import NEEDS_RAY
from tests.storage.s3_server import S3Server
from tests.training.test_ray_jobs import events_of, published_rows, rows_without_ray, starts_of
from tests.training.tiny_jobs import largest_difference
from training.config import TrainingSettings
from training.events import WorkerStarted
from training.job_settings import JobSettings
from training.spec_file import read_spec

JOB = "growing"
CPUS = 2  # of either machine: room for one worker
LONGEST_WAIT_S = 120.0
LONGEST_JOB_S = 300.0
SECOND_ROUND = 4
"""Of the commits: a driver and an attempt begin with one, each round ends with one."""


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    cluster = start_cluster(num_cpus=CPUS)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def settings(s3_settings: StorageSettings, tmp_path: Path) -> JobSettings:
    return JobSettings(
        # The first worker's commit waits for the other machine.
        storage=s3_settings.model_copy(update={"s3_timeout_s": LONGEST_WAIT_S}),
        training=TrainingSettings(
            storage_path=tmp_path / "scratch",
            num_workers=2,
            min_workers=1,
            cpus_per_worker=CPUS,
            threads=1,
            max_failures=0,  # only for room is it begun anew
            look_for_room_s=0.5,
        ),
    )


@pytest.fixture
def spec_file(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    lines = [{"prompt": f"the fox {n}", "completion": "jumps over"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"""
base: {tiny_llama_dir}
base_id: tiny
dtype: float32
checkpoint_every_steps: 4
defaults: {{data: data.jsonl, batch_size: 2, steps: 24}}
adapters:
  - {{name: short, rank: 1}}
  - {{name: long, rank: 4}}
"""
    )
    return path


@contextmanager
def running(command: list[str], cluster: LocalCluster) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **cluster.environment},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(LONGEST_WAIT_S)


def another_machine(cluster: LocalCluster) -> list[str]:
    """The command of a second raylet, which Ray takes for a machine of its own."""
    return [
        *("ray.scripts.scripts", "start", "--block", f"--address={cluster.address}"),
        *(f"--num-cpus={CPUS}", "--disable-usage-stats", f"--object-store-memory={80 << 20}"),
    ]


def driver(
    cluster: LocalCluster, settings: JobSettings, spec_file: Path, directory: Path
) -> list[str]:
    told = {
        "cluster": cluster.as_dict(),
        "settings": settings.model_dump(mode="json"),
        "spec": str(spec_file),
        "job_id": JOB,
    }
    (directory / "driver.json").write_text(json.dumps(told))
    return ["tests.training.driver_process", str(directory / "driver.json")]


def wait_until(has_come: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    while not has_come():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@NEEDS_RAY
def test_a_job_takes_in_a_worker_when_another_machine_joins(
    cluster: LocalCluster,
    s3_api: S3Server,
    settings: JobSettings,
    spec_file: Path,
    tmp_path: Path,
) -> None:
    """It goes on from its last checkpoint with a share for each, and ends as if nothing had happened."""
    joined: list[subprocess.Popen[bytes]] = []
    commits = 0

    def another_comes(method: str, path: str) -> None:
        """While the first worker waits to commit its second round. Ray ends it, to begin anew with two."""
        nonlocal commits
        commits += method == "PUT" and "commit.json" in path
        if commits == SECOND_ROUND and not joined:
            joined.append(stack.enter_context(running(another_machine(cluster), cluster)))
            (worker,) = (e for e in events_of(settings, JOB) if isinstance(e, WorkerStarted))
            wait_until(lambda: not psutil.pid_exists(worker.pid))

    s3_api.before = another_comes
    with ExitStack() as stack:
        command = driver(cluster, settings, spec_file, tmp_path)
        job = stack.enter_context(running(command, cluster))
        assert job.wait(LONGEST_JOB_S) == 0

    assert joined
    events = events_of(settings, JOB)
    started = [
        (e.worker, e.workers, len(e.adapters)) for e in events if isinstance(e, WorkerStarted)
    ]
    assert started[0] == (0, 1, 2)
    assert sorted(started[1:]) == [(0, 2, 1), (1, 2, 1)]
    for adapter in ("short", "long"):
        first_step, later_step = starts_of(events, adapter)
        assert first_step == 0 < later_step, "it goes on from a checkpoint"
    spec = read_spec(spec_file)
    expected = rows_without_ray(spec)
    for adapter in spec.adapters:
        _, rows = published_rows(settings, adapter.name)
        assert largest_difference(rows, expected[adapter.name]) <= 1e-6
