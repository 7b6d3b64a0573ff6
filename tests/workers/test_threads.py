"""An engine computes on the cores that are its own, and its loads do not take them from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    Fetched,
    Shelf,
    greedy,
    projections,
    prompt,
    random_adapter,
    small_engine,
    version,
)
from tests.workers.engine.transports import Inbox
from workers.engine.request import StepOutputs
from workers.engine.thread_client import ThreadEngineClient
from workers.threads import engine_threads, take_turns_often, usable_cpus


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "250000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n2:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_usable_cpus_are_the_affinity_held_to_every_quota(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert usable_cpus(write(tmp_path, files)) == expected


@pytest.mark.usefixtures("many_cores")
def test_settings_come_first_then_the_environment_then_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engine_threads(5) == 5
    assert engine_threads(0) == min(3, usable_cpus())
    monkeypatch.setenv("OMP_NUM_THREADS", "64,2")
    assert engine_threads(0) == usable_cpus()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert engine_threads(0) == usable_cpus()


def test_steps_run_on_the_engines_threads_and_loads_on_one(tiny_llama_dir: Path) -> None:
    seen: dict[str, int] = {}

    class Watching(Shelf):
        def get(self, wanted: AdapterVersion) -> Fetched:
            seen["load"] = torch.get_num_threads()
            return super().get(wanted)

    rows = random_adapter(projections(tiny_llama_dir), "flora", 1, seed=1)
    before = torch.get_num_threads()
    engine = small_engine(tiny_llama_dir, Watching({version(1): rows}), threads=3)
    inbox = Inbox()

    def on_step(outputs: StepOutputs) -> None:
        seen["step"] = torch.get_num_threads()
        inbox(outputs)

    client = ThreadEngineClient(engine)
    client.start(on_step)
    client.submit(greedy("r", prompt(0, 4), version(1)))
    inbox.wait_for_ends("r")
    assert client.load().threads == 3
    client.stop()
    assert seen == {"load": 1, "step": 3}
    assert torch.get_num_threads() == before


def test_an_engines_process_changes_threads_five_times_as_often_as_python_does() -> None:
    usual_s = sys.getswitchinterval()
    try:
        take_turns_often()
        assert sys.getswitchinterval() == pytest.approx(usual_s / 5)
    finally:
        sys.setswitchinterval(usual_s)
