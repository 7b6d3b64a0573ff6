"""`python -m training.job` with something that cannot be trained: exit code 2, the place by name, and no Ray begun."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from training import ray_train
from training.job import EXIT_WRONG_INPUT, main

GOOD = {"prompt": "the quick fox", "completion": " jumps over"}


def job_on(base: Path, folder: Path, **fields: Any) -> Path:
    """A specification of one good adapter and one, `bad`, that has these fields."""
    (folder / "good.jsonl").write_text("\n".join([json.dumps(GOOD)] * 40))
    adapters = [
        {"name": "good", "rank": 1, "data": "good.jsonl"},
        {"name": "bad", "rank": 1, "data": "good.jsonl", **fields},
    ]
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "adapters": adapters}, sort_keys=False))
    return path


def bad_data(folder: Path, *lines: str) -> str:
    (folder / "bad.jsonl").write_text("\n".join(lines))
    return "bad.jsonl"


def broken_line_37(folder: Path) -> str:
    lines = [json.dumps(GOOD)] * 40
    lines[36] = lines[36][:-5]
    return bad_data(folder, *lines)


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job that got as far as its workers would fail another way, also where a Ray is up already."""

    def begin(*_: Any) -> NoReturn:
        raise AssertionError("workers would have been started")

    monkeypatch.setattr(ray_train, "drive", begin)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("FLORA_STORAGE__REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("FLORA_TRAINING__STORAGE_PATH", str(tmp_path / "jobs"))


NO_COMPLETION = json.dumps({"prompt": "the quick fox"})
NO_ANSWER = json.dumps({"messages": [{"role": "user", "content": "fox?"}]})
EMPTY_ANSWER = json.dumps({"instruction": "fox", "output": ""})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data": broken_line_37}, r"bad\.jsonl, line 37: not JSON"),
        ({"data": lambda at: bad_data(at, NO_COMPLETION)}, r"bad\.jsonl, line 1: no known format"),
        ({"data": lambda at: bad_data(at, NO_ANSWER)}, r"bad\.jsonl, line 1: the last message"),
        ({"data": lambda at: bad_data(at, EMPTY_ANSWER)}, r"bad\.jsonl, line 1: output: is empty"),
        ({"data": bad_data}, r"bad\.jsonl: no examples"),
        ({"sequence_length": 3}, r"bad: no example has a completion within sequence_length 3"),
        ({"rank": 0}, r"spec\.yaml, line 7: adapters\.1\.rank: .*greater than or equal to 1"),
        ({"target_modules": ["c_attn"]}, r"bad: the model has no linear layer 'c_attn'; it has"),
        (
            {"evaluation": {"data": broken_line_37}},
            r"bad\.jsonl, line 37: not JSON",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_is_refused_before_any_worker_starts(
    caplog: pytest.LogCaptureFixture,
    tiny_llama_dir: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    says: str,
) -> None:
    made = {key: _made(value, tmp_path) for key, value in fields.items()}
    spec = job_on(tiny_llama_dir, tmp_path, **made)
    assert_refused([str(spec)], says, caplog)


def _made(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _made(inner, folder) for key, inner in value.items()}
    return value(folder) if callable(value) else value


def assert_refused(arguments: list[str], says: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert main(arguments) == EXIT_WRONG_INPUT
    assert re.search(says, caplog.text)


def test_an_unknown_base_is_refused(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    spec = job_on(tmp_path / "nowhere", tmp_path)
    assert_refused([str(spec)], "there is no model at .*nowhere", caplog)


def test_an_adapter_that_does_not_fit_in_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny_llama_dir: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FLORA_TRAINING__MEMORY_BYTES", str(670 << 20))
    spec = job_on(tiny_llama_dir, tmp_path, rank=1024)
    assert_refused(
        [str(spec)], r"bad: does not fit in memory even alone: .* the budget is 670 MiB", caplog
    )


def test_the_process_itself_ends_with_exit_code_2_and_one_line(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    spec = job_on(tiny_llama_dir, tmp_path, data=broken_line_37(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", "training.job", str(spec)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    assert ended.returncode == EXIT_WRONG_INPUT
    assert ended.stderr.strip().startswith("bad.jsonl, line 37: not JSON")
    assert len(ended.stderr.strip().splitlines()) == 1
