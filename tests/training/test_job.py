"""The entry point before anything starts: its settings, and the exit code of what is wrong."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import SpecificationError
from training.config import TrainingSettings
from training.job import main, new_job_id
from training.job_settings import JobSettings, as_environment, read_job_settings


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


def test_job_ids_say_what_they_are_of_and_are_never_the_same() -> None:
    first, second = new_job_id("examples/My Demo.yaml"), new_job_id("examples/My Demo.yaml")
    assert re.fullmatch(r"my-demo-\d{8}-\d{6}-[0-9a-f]{6}", first)
    assert first != second
