"""Every command explains itself, and tells the shell how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from cli.errors import CommandFailedError, exit_code
from cli.main import app
from cli.settings import command_settings
from storage.errors import (
    AdapterRefusedError,
    InvalidRequestError,
    OverloadedError,
    SpecificationError,
    StoreUnavailableError,
    UnknownModelError,
)
from tests.cli.conftest import Flora, as_json


def commands() -> list[list[str]]:
    """Every command there is, found in the application itself."""
    group = typer.main.get_command(app)
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        nested = getattr(command, "commands", None)
        found += [[name, inner] for inner in nested] if nested else [[name]]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_explains_itself_with_an_example(flora: Flora, command: list[str]) -> None:
    text = flora(*command, "--help").stdout
    assert f"Example: flora {' '.join(command)}" in text


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_can_speak_json(flora: Flora, command: list[str]) -> None:
    assert "--json" in flora(*command, "--help").stdout


def test_the_promised_commands_exist(flora: Flora) -> None:
    promised = {
        "": "up down status demo chat train doctor",
        "adapters": "ls show push pull import alias pin rm gc verify",
        "base": "pull ls",
        "jobs": "ls show logs cancel",
        "keys": "create ls revoke",
    }
    names = {" ".join(command) for command in commands()}
    assert names >= {
        f"{group} {name}".strip() for group, some in promised.items() for name in some.split()
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["up", "--replicas", "0"],
        ["up", "--replicas", "4..1"],
        ["chat"],
        ["train", "missing.yaml"],
    ],
)
def test_wrong_usage_is_exit_code_2(flora: Flora, arguments: list[str]) -> None:
    assert flora(*arguments, code=2).stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("x"), 2),
        (SpecificationError("x"), 2),
        (UnknownModelError("x"), 2),
        (AdapterRefusedError("x"), 2),
        (OverloadedError("x"), 1),
        (StoreUnavailableError("x"), 1),
        (CommandFailedError("x"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_what_the_user_can_put_right_is_2_and_what_failed_is_1(
    error: BaseException, code: int
) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("command", [["status"], ["chat", "captain", "-p", "hi"]])
def test_without_a_cluster_a_command_says_how_to_start_one(
    flora: Flora, command: list[str]
) -> None:
    result = flora(*command, code=1)
    assert "flora up" in result.stderr
    assert result.stdout == ""


def test_a_cluster_that_does_not_answer_is_named(flora: Flora) -> None:
    result = flora("status", "--url", "http://127.0.0.1:9", code=1)
    assert "http://127.0.0.1:9" in result.stderr


def test_down_without_a_cluster_is_no_failure(flora: Flora) -> None:
    assert as_json(flora("down", "--json")) == {"stopped": False}


def test_a_job_cannot_be_left_to_a_cluster_that_is_not_there(flora: Flora) -> None:
    assert "flora up" in flora("train", "--attach", "some-job", code=2).stderr
    assert "specification" in flora("train", code=2).stderr


@pytest.mark.parametrize(
    ("base", "fields", "says"),
    [
        ("no/such/base", {}, "there is no model at no/such/base"),
        ("", {"target_modules": ["q_prj"]}, "bad: the model has no linear layer 'q_prj'; it has"),
        ("", {"sequence_length": 1_000_000}, "bad: sequence_length"),
        ("", {"rank": 0}, "rank"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_ray_is_started(
    flora: Flora,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    fields: dict[str, object],
    says: str,
) -> None:
    def start(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a Ray would have been started")

    monkeypatch.setattr("cli.train.start_cluster", start)
    (tmp_path / "data.jsonl").write_text('{"prompt": "fox", "completion": " jumps"}\n')
    adapter = {"name": "bad", "rank": 1, "data": "data.jsonl", **fields}
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"base": base or str(tiny_llama_dir), "adapters": [adapter]}))
    assert says in " ".join(flora("train", spec, code=2).stderr.split())


def test_the_doctor_finds_what_is_missing_and_says_what_to_do(flora: Flora) -> None:
    result = flora("doctor", "--json", code=1)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert checks["base"]["ok"] is False
    assert checks["base"]["fix"] == "flora base pull"
    assert checks["registry"]["ok"] is True
    assert checks["python"]["ok"] is True


def test_the_doctor_sees_a_registry_it_cannot_reach(flora: Flora) -> None:
    flags = ["--registry", "s3://flora/x", "--s3-endpoint", "http://127.0.0.1:9"]
    checks = {c["name"]: c for c in json.loads(flora("doctor", "--json", *flags, code=1).stdout)}
    assert checks["registry"]["ok"] is False
    assert "http://127.0.0.1:9" in checks["registry"]["found"]


def test_a_wrong_setting_is_named(
    flora: Flora, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("FLORA_ENGINE__BANK_ROWS", "none")
    assert "engine.bank_rows" in flora("up", code=2).stderr
    monkeypatch.delenv("FLORA_ENGINE__BANK_ROWS")
    file = tmp_path_factory.mktemp("settings") / "flora.yaml"
    file.write_text("engine: {bank_row: 3}\n")
    assert "engine.bank_row" in flora("up", "--config", str(file), code=2).stderr


def test_a_relative_registry_means_the_same_place_everywhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = command_settings(storage={"registry": "here"})
    assert settings.storage.registry == str(tmp_path / "here")
    assert settings.storage.cache_dir == home / "cache"
    assert settings.training.storage_path == home / "training"
    remote = command_settings(storage={"registry": "s3://bucket/prefix"})
    assert remote.storage.registry == "s3://bucket/prefix"


def test_flags_win_over_variables_and_variables_over_the_home(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command_settings().storage.registry == str(home / "registry")
    monkeypatch.setenv("FLORA_STORAGE__REGISTRY", "/variable")
    assert command_settings().storage.registry == "/variable"
    assert command_settings(storage={"registry": "/flag"}).storage.registry == "/flag"
