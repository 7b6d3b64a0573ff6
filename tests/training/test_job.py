"""The entry point before anything starts: its settings, and the exit code of what is wrong."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import SpecificationError
from storage.local_store import LocalObjectStore
from storage.stores import open_store
from training import job
from training.config import TrainingSettings
from training.events import JobFailed
from training.job import main, new_job_id
from training.job_settings import JobSettings, as_environment, read_job_settings
from training.job_store import JobStore


def test_settings_reach_another_process_through_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = JobSettings(
        storage=StorageSettings(registry="s3://bucket/x", s3_endpoint_url="http://127.0.0.1:9000"),
        training=TrainingSettings(num_workers=3, cpus_per_worker=0.5, storage_path=tmp_path),
    )
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert read_job_settings() == settings


def test_a_settings_file_wins_over_the_environment_and_keeps_other_areas_to_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLORA_TRAINING__NUM_WORKERS", "3")
    monkeypatch.setenv("FLORA_TRAINING__THREADS", "2")
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {bank_rows: 9}\ntraining: {num_workers: 4}\n")
    training = read_job_settings(file).training
    assert (training.num_workers, training.threads) == (4, 2)


@pytest.mark.parametrize("text", ["training: {num_wrokers: 4}", "training: {num_workers: 0}"])
def test_a_wrong_setting_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SpecificationError, match=r"training\.num_w"):
        read_job_settings(file)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.yaml"], r"gone\.yaml: cannot be read"),
        (["spec.yaml"], r"spec\.yaml, line 2: adapters\.0\.rank"),
        (["spec.yaml", "--settings", "gone.yaml"], r"gone\.yaml"),
        (["store:jobs/none/spec.json", "--job-id", "a"], "no such specification in the store"),
        (["store:jobs/none/spec.json", "--job-id", "../a"], "not a valid name"),
        (["spec.yaml", "--set", "adapters.0.rank=1"], "there is no model at"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLORA_STORAGE__REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("FLORA_TRAINING__STORAGE_PATH", str(tmp_path / "jobs"))
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    Path("spec.yaml").write_text(
        "base: no/where/base\nadapters: [{name: a, rank: 0, data: data.jsonl}]"
    )
    with caplog.at_level(logging.INFO):
        assert main(arguments) == 2
    assert re.search(says, caplog.text)


ADAPTER = "adapters: [{name: a, rank: 1, data: data.jsonl}]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"base: b\n? [a]\n: c\n{ADAPTER}", "line 2: the name of a field is text"),
        (f"base: b\ndefaults: &a {{evaluation: *a}}\n{ADAPTER}", "line 2: this value holds itself"),
        (f"base: b\x01\n{ADAPTER}", r"line 1: has a character .* U\+0001"),
        (f"base: 2024-13-45\n{ADAPTER}", "line 1: a value that cannot be read"),
        ("base: b\nsweep: [{name: 'a{rank.x}', data: data.jsonl, over: {rank: [1]}}]",
         r"line 2: sweep\.0\.name"),
        ("base: b\nadapters: [{name: a, rank: 1, data: ~nouser/}]", r"line 2: adapters\.0\.data"),
        (f"base: b\nadapters: [{{name: a, rank: 1, data: {'x' * 300}}}]",
         r"line 2: adapters\.0\.data"),
        ("base: " + "[" * 600, "nested too deep"),
    ],
)  # fmt: skip
def test_whoever_waits_for_a_stored_specification_is_told_that_it_was_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, says: str
) -> None:
    monkeypatch.setenv("FLORA_STORAGE__REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("FLORA_TRAINING__STORAGE_PATH", str(tmp_path / "jobs"))
    store = LocalObjectStore(tmp_path / "registry")
    store.put("jobs/a/spec/spec.yaml", text.encode())
    store.put("jobs/a/spec/data.jsonl", b'{"prompt": "a", "completion": "b"}')
    assert main(["store:jobs/a/spec/spec.yaml", "--job-id", "a"]) == 2
    (told,) = JobStore(store, "a").read_events().events
    assert isinstance(told, JobFailed)
    assert re.search(says, told.reason)


def test_a_job_that_meets_an_error_nobody_thought_of_says_so_once_and_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else whoever waits for it would start it again and again."""
    monkeypatch.setenv("FLORA_STORAGE__REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("FLORA_TRAINING__STORAGE_PATH", str(tmp_path / "jobs"))

    def broken(*_: object) -> None:
        raise OverflowError("a secret of the machine's")

    monkeypatch.setattr(job, "read_spec", broken)
    with pytest.raises(OverflowError):
        main(["spec.yaml", "--job-id", "one"])
    store = open_store(StorageSettings(registry=str(tmp_path / "registry")))
    (event,) = JobStore(store, "one").read_events().events
    assert isinstance(event, JobFailed)
    assert "OverflowError" in event.reason and "secret" not in event.reason


def test_job_ids_say_what_they_are_of_and_are_never_the_same() -> None:
    first, second = new_job_id("examples/My Demo.yaml"), new_job_id("examples/My Demo.yaml")
    assert re.fullmatch(r"my-demo-\d{8}-\d{6}-[0-9a-f]{6}", first)
    assert first != second
