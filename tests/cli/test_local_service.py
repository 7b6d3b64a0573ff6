"""A person's session on one machine: up, train, ask, look, down; and what is left after each way out: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import NEEDS_RAY

pytestmark = NEEDS_RAY

BASE = "tiny-llama"
START_TIMEOUT_S = 240


class Person:
    """Runs `flora` as a process of its own, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ray_environment: dict[str, str] = {}
        self.environment = {**os.environ, "FLORA_HOME": str(home), "FLORA_ENGINE__DTYPE": "float32"}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "FLORA_URL"):
            self.environment.pop(name, None)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a script are deaf to Ctrl-C, and so would be what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def flora(self, *arguments: object, code: int = 0) -> str:
        """Standard output; standard error where the command is expected to fail."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == code, f"{out}\n{err}"
        assert "Traceback" not in err
        return err if code else out

    def json(self, *arguments: object) -> Any:
        return json.loads(self.flora(*arguments, "--json"))

    @property
    def state(self) -> dict[str, Any] | None:
        file = self.home / "cluster.json"
        return json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Person:
    person = Person(tmp_path_factory.mktemp("person") / "home")
    person.flora("base", "pull", tiny_llama_dir)
    return person


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of two ranks and a few steps, with data of their own."""
    folder = tmp_path_factory.mktemp("spec")
    for name in ("red", "blue"):
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"{n}"},
                    {"role": "assistant", "content": name},
                ]
            }
            for n in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {
        "base": BASE,
        "defaults": {"steps": 3, "batch_size": 2, "sequence_length": 64},
        "adapters": [
            {"name": "red", "rank": 1, "data": "red.jsonl"},
            {"name": "blue", "rank": 4, "data": "blue.jsonl"},
        ],
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(values))
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def url(person: Person) -> Iterator[str]:
    """A cluster that is up, of two replicas whose banks hold one of the two adapters at a time."""
    ready = person.json("up", "--base", BASE, "--replicas", 2, "--port", 0, "--bank-rows", 4)
    person.ray_environment = ready["environment"]
    yield ready["url"]
    person.flora("down")


def processes_under(directory: str) -> list[psutil.Process]:
    """Every process that was started with a path in this directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(directory in part for part in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found


def test_a_trained_adapter_answers_and_is_seen_where_it_lies(
    person: Person, url: str, spec: Path
) -> None:
    trained = person.json("train", spec)
    assert set(trained["published"]) == {"red", "blue"}
    assert trained["failed"] == {}

    for adapter, version in trained["published"].items():
        answer = person.json("chat", adapter, "--prompt", "1", "--max-tokens", 4)
        assert answer["version"] == version
        assert answer["tier"] in ("registry", "disk", "host", "device")
    streamed = person.flora("chat", adapter, "--prompt", "1", "--max-tokens", 4)
    assert streamed.strip("\n") == answer["answer"].strip("\n")

    seen = person.json("status")
    assert {adapter["id"] for adapter in seen["adapters"]} == {"red", "blue"}
    held = {version for replica in seen["cluster"]["replicas"] for version in replica["disk"]}
    assert held == set(trained["published"].values())
    assert "blue@latest" in person.flora("status")


def test_rays_own_command_submits_a_job_whose_adapters_answer(
    person: Person, url: str, spec: Path
) -> None:
    values = {**yaml.safe_load(spec.read_text()), "base": str(person.home / "bases" / BASE)}
    values["adapters"] = [{**values["adapters"][0], "name": "green"}]
    (spec.parent / "green.yaml").write_text(yaml.safe_dump(values))
    submit = ["job", "submit", "--working-dir", ".", "--no-wait"]
    job = [
        "--",
        "python",
        "-m",
        "training.job",
        str(spec.parent / "green.yaml"),
        "--job-id",
        "green",
    ]
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *submit, "--submission-id", "green", *job],
        cwd=Path(__file__).resolve().parents[2],
        env={**person.environment, **person.ray_environment},
        capture_output=True,
        check=True,
    )
    assert set(person.json("train", "--attach", "green")["published"]) == {"green"}
    assert person.json("chat", "green", "--prompt", "1", "--max-tokens", 4)["version"]


def test_commands_use_the_registry_of_the_running_cluster(person: Person, url: str) -> None:
    running = person.state
    assert running is not None and running["url"] == url
    listed = person.json("adapters", "ls")
    assert {"blue", "red"} <= {adapter["name"] for adapter in listed}


def test_an_unknown_model_is_a_wrong_question_and_names_it(person: Person, url: str) -> None:
    assert "nobody" in person.flora("chat", "nobody", "--prompt", "1", code=2)


def test_a_second_up_leaves_the_first_alone(person: Person, url: str) -> None:
    assert url in person.flora("up", code=1)
    assert person.json("status")["cluster"]["base"] == BASE


def test_watching_ends_with_ctrl_c_and_without_a_trace(
    person: Person, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a terminal: elsewhere only what was seen last is written, at the end.
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setitem(person.environment, name, value)
    watching = person.start("status", "--watch")
    assert watching.stdout is not None
    assert any("replica" in line for line in watching.stdout), watching.communicate()[1]
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 0, err
    assert err == ""


def test_ctrl_c_cancels_the_job_and_leaves_the_cluster(
    person: Person, url: str, spec: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(spec.read_text())
    values["defaults"]["steps"] = 100_000
    for adapter in values["adapters"]:
        adapter["data"] = str(spec.parent / adapter["data"])
    (tmp_path / "endless.yaml").write_text(yaml.safe_dump(values))

    training = person.start("train", tmp_path / "endless.yaml")
    jobs = person.home / "registry" / "jobs"
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not list(jobs.glob("endless-*/events/worker-*")) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    training.send_signal(signal.SIGINT)
    _, err = training.communicate(timeout=60)

    assert training.returncode == 1
    assert "Traceback" not in err
    (job,) = (path.name for path in jobs.glob("endless-*"))
    assert "was cancelled" in person.flora("train", "--attach", job, code=1)
    assert person.json("jobs", "show", job)["status"] == "cancelled"
    assert "the job was cancelled" in person.flora("jobs", "logs", job)
    assert person.json("status")["cluster"]["base"] == BASE


def test_down_leaves_no_process_and_no_state(person: Person, spec: Path) -> None:
    other = Person(person.home.parent / "other")
    other.flora("base", "pull", person.home / "bases" / BASE)
    starting = other.start("up", "--base", BASE, "--port", 0)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while other.state is None and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert other.state is not None
    directory = other.state["ray"]["directory"]
    assert processes_under(directory)

    starting.send_signal(signal.SIGINT)  # in the middle of its work
    _, err = starting.communicate(timeout=60)

    assert starting.returncode == 1
    assert "Traceback" not in err
    assert other.state is None
    assert processes_under(directory) == []
    assert not Path(directory).exists()
    assert other.json("down") == {"stopped": False}
