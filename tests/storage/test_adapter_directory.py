"""A directory appears whole or not at all, and only where nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.adapter_directory import read_directory, write_directory
from storage.errors import AdapterRefusedError, InvalidRequestError
from tests.storage.versions import files_of


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    for target in (tmp_path / "new" / "adapter", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        write_directory(target, files_of("one"))
        assert read_directory(target) == files_of("one")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(InvalidRequestError, match="not an empty directory"):
            write_directory(target, files_of("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "/abs", "..", ""])
def test_a_file_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        write_directory(tmp_path / "adapter", {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_directory(tmp_path / "adapter", {"good": b"1", "n" * 300: b"2"})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_an_adapter_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AdapterRefusedError) as refused:
            read_directory(path)
        assert str(path) in refused.value.message
