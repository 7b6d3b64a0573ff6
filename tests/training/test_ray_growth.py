"""Workers come to a job that is under way, when the cluster gets another machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from cli.local_cluster import LocalCluster
from storage.config import StorageSettings
from tests.storage.s3_server import S3Server
from tests.training.test_ray_jobs import events_of, published_rows, rows_without_ray
from tests.training.tiny_jobs import largest_difference
from training.config import TrainingSettings
from training.events import WorkerStarted
from training.job_settings import JobSettings
from training.ray_train import run_training
from training.spec import TrainingSpec
from training.spec_file import read_spec

LONGEST_WAIT_S = 60.0
SECOND_ROUND = 4
"""Of the commits: a driver and an attempt begin with one, each round ends with one."""


@pytest.fixture
def spec(tiny_llama_dir: Path, tmp_path: Path) -> TrainingSpec:
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
    return read_spec(path)


def wait_until(has_come: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    while not has_come():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def machines() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def start_machine(cluster: LocalCluster, cpus: int) -> subprocess.Popen[bytes]:
    """A second raylet, which Ray takes for a machine of its own. Ends on SIGTERM."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--address={cluster.address}", f"--num-cpus={cpus}", "--disable-usage-stats"),
            f"--object-store-memory={80 << 20}",
        ],
        env={**os.environ, **cluster.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_a_job_takes_in_a_worker_when_another_machine_joins(
    ray_session: LocalCluster,
    s3_api: S3Server,
    s3_settings: StorageSettings,
    spec: TrainingSpec,
    tmp_path: Path,
) -> None:
    """It goes on from its last checkpoint with a share for each, and ends as if nothing had happened."""
    cpus = int(ray.cluster_resources()["CPU"]) // 2 + 1  # room for one worker on either machine
    settings = JobSettings(
        storage=s3_settings,
        training=TrainingSettings(
            storage_path=tmp_path / "scratch",
            num_workers=2,
            min_workers=1,
            cpus_per_worker=cpus,
            threads=1,
            look_for_room_s=0.5,
        ),
    )
    commits = 0

    def another_comes(method: str, path: str) -> None:
        """While the first worker waits to commit its second round. Ray ends it, to begin anew with two."""
        nonlocal commits
        commits += method == "PUT" and "commit.json" in path
        if commits == SECOND_ROUND and not machine:
            machine.append(start_machine(ray_session, cpus))
            wait_until(lambda: machines() == 2)
            (worker,) = (e for e in events_of(settings, "growing") if isinstance(e, WorkerStarted))
            wait_until(lambda: not psutil.pid_exists(worker.pid))

    s3_api.before = another_comes
    machine: list[subprocess.Popen[bytes]] = []
    try:
        result = run_training(spec, settings, lambda event: None, job_id="growing")
    finally:
        for process in machine:
            process.terminate()
            process.wait(LONGEST_WAIT_S)
        wait_until(lambda: machines() == 1)

    told = [e for e in events_of(settings, "growing") if isinstance(e, WorkerStarted)]
    assert [(e.worker, e.workers, len(e.adapters)) for e in told[:1]] == [(0, 1, 2)]
    assert sorted((e.worker, e.workers, len(e.adapters)) for e in told[1:]) == [
        (0, 2, 1),
        (1, 2, 1),
    ]
    assert result.is_success
    expected = rows_without_ray(spec)
    for adapter in spec.adapters:
        version, rows = published_rows(settings, adapter.name)
        assert result.published[adapter.name] == version
        assert largest_difference(rows, expected[adapter.name]) <= 1e-6
