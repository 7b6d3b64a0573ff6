"""The `flora` command as a person runs it, in a home of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app

Flora = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $FLORA_HOME; every default lies in it, and no setting of this machine counts."""
    for name in ("FLORA_STORAGE__REGISTRY", "FLORA_STORAGE__CACHE_DIR"):
        monkeypatch.setenv(name, "x")  # so that what a command sets here is taken back afterwards
        monkeypatch.delenv(name)
    for name in ("FLORA_TRAINING__STORAGE_PATH", "FLORA_ENGINE__BASE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def flora(home: Path) -> Flora:
    """`flora("adapters", "ls")` → its result; its exit code is checked to be 0 unless `code` says otherwise."""

    def run(*arguments: str, code: int = 0, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(part) for part in arguments], input=input)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return run


def as_json(result: Result) -> Any:
    """Standard output, which must be one JSON value."""
    return json.loads(result.stdout)
