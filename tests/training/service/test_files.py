"""Uploaded files: what comes out is what went in, under one name for one content, for its tenant alone."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from storage.errors import AdapterCorruptError, InvalidRequestError, NotFoundError, OverloadedError
from storage.object_store import ObjectStore
from tests.training.service.desks import Clock
from training.service import files as files_module
from training.service.files import UploadedFiles


@pytest.fixture
def files(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> UploadedFiles:
    monkeypatch.setattr(files_module, "_PART_BYTES", 1000)
    return UploadedFiles(store, Clock())


def test_a_file_of_several_parts_comes_back_whole(files: UploadedFiles, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    file = files.add("us", "dir/d.jsonl", io.BytesIO(data))
    assert (file.filename, file.num_bytes, file.num_parts) == ("d.jsonl", 2560, 3)
    assert b"".join(files.content(files.get("us", file.file_id))) == data
    path = files.fetch(file, tmp_path)
    assert (path.name, path.read_bytes()) == ("d.jsonl", data)


def test_the_same_file_again_is_the_same_file_and_another_tenants_is_unknown(
    files: UploadedFiles,
) -> None:
    one = files.add("us", "d.jsonl", io.BytesIO(b"x"))
    assert files.add("us", "d.jsonl", io.BytesIO(b"x")) == one
    other = files.add("us", "d.jsonl", io.BytesIO(b""))
    theirs = files.add("them", "d.jsonl", io.BytesIO(b"x"))
    assert len({one.file_id, other.file_id, theirs.file_id}) == 3
    assert {file.file_id for file in files.of("us")} == {one.file_id, other.file_id}
    for unknown in (theirs.file_id, "file-", "../keys", "file-../x"):
        with pytest.raises(NotFoundError):
            files.get("us", unknown)


def test_a_deleted_file_leaves_nothing(files: UploadedFiles, store: ObjectStore) -> None:
    file = files.add("us", "d.jsonl", io.BytesIO(b"x" * 2500))
    files.delete("us", file.file_id)
    assert list(store.list("files/")) == []
    with pytest.raises(NotFoundError):
        files.delete("us", file.file_id)
    with pytest.raises(NotFoundError, match="was deleted"):
        list(files.content(file))


def test_a_file_deleted_while_it_is_uploaded_is_never_a_record_without_content(
    files: UploadedFiles, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.add("us", "d.jsonl", io.BytesIO(b"x" * 2500))
    commit = store.put_if_absent

    def late(key: str, data: bytes) -> object:
        monkeypatch.setattr(store, "put_if_absent", commit)
        UploadedFiles(store, Clock()).delete("us", file.file_id)
        return commit(key, data)

    monkeypatch.setattr(store, "put_if_absent", late)
    with pytest.raises(OverloadedError, match="upload it again"):
        files.add("us", "d.jsonl", io.BytesIO(b"x" * 2500))
    assert files.of("us") == []
    again = files.add("us", "d.jsonl", io.BytesIO(b"x" * 2500))
    assert b"".join(files.content(again)) == b"x" * 2500


def test_a_damaged_file_never_passes_for_whole(files: UploadedFiles, store: ObjectStore) -> None:
    file = files.add("us", "d.jsonl", io.BytesIO(b"x" * 2500))
    store.put(f"files/us/{file.file_id}/00001", b"y" * 1000)
    with pytest.raises(AdapterCorruptError, match="damaged"):
        list(files.content(file))


@pytest.mark.parametrize("name", ["", "..", "a/", "x" * 61, "a\nb"])
def test_a_name_that_no_file_could_have_is_refused(files: UploadedFiles, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="name"):
        files.add("us", name, io.BytesIO(b"x"))
