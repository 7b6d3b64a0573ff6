"""A base model in S3 comes to a machine once, whole, and is what is there now; nobody ever sees half of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from storage import base_download
from storage.base_download import fetch_base
from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.manifest import FileEntry
from tests.storage.s3_server import Failure, S3Server, s3_server

_BUCKET = "models"
_FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 400,
    "tokenizer.json": b"[1]",
}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        boto3.client("s3", endpoint_url=running.url).create_bucket(Bucket=_BUCKET)
        yield running


@pytest.fixture
def settings(server: S3Server, tmp_path: Path) -> StorageSettings:
    server.failures.clear()
    return StorageSettings(
        s3_endpoint_url=server.url, s3_timeout_s=3.0, cache_dir=tmp_path / "cache"
    )


@pytest.fixture
def place(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own with the files of a model."""
    prefix = request.node.name
    for name, data in _FILES.items():
        put(server, f"{prefix}/{name}", data)
    server.requests.clear()
    return f"s3://{_BUCKET}/{prefix}"


def put(server: S3Server, key: str, data: bytes) -> None:
    boto3.client("s3", endpoint_url=server.url).put_object(Bucket=_BUCKET, Key=key, Body=data)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_prefix_is_downloaded_once(
    place: str, settings: StorageSettings, server: S3Server
) -> None:
    put(server, f"{place.removeprefix(f's3://{_BUCKET}/')}/optimizer.pt", b"not wanted")
    put(server, f"{place.removeprefix(f's3://{_BUCKET}/')}/sub/config.json", b"not wanted")
    directory = fetch_base(place, settings)
    assert contents(directory) == _FILES
    server.requests.clear()
    assert fetch_base(place + "/", settings) == directory
    assert server.requests == ["GET"], "only the listing"


def test_large_objects_come_in_ranges(
    place: str, settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.base_download._CHUNK_BYTES", 1000)
    assert contents(fetch_base(place, settings)) == _FILES


def test_a_model_replaced_in_its_place_is_another_directory(
    place: str, settings: StorageSettings, server: S3Server
) -> None:
    old = fetch_base(place, settings)
    put(server, f"{place.removeprefix(f's3://{_BUCKET}/')}/tokenizer.json", b"[1, 2]")
    new = fetch_base(place, settings)
    assert contents(new)["tokenizer.json"] == b"[1, 2]"
    assert contents(old) == _FILES


def test_equal_files_in_two_places_are_kept_once(
    place: str, settings: StorageSettings, server: S3Server
) -> None:
    for name, data in _FILES.items():
        put(server, f"copy-of-it/{name}", data)
    assert fetch_base(place, settings) == fetch_base(f"s3://{_BUCKET}/copy-of-it", settings)


@pytest.mark.parametrize(
    "damage", ["a flipped bit", "a cut file", "a lost file", "a broken record"]
)
def test_damaged_files_are_downloaded_again(
    place: str, settings: StorageSettings, damage: str
) -> None:
    directory = fetch_base(place, settings)
    weights = directory / "model.safetensors"
    match damage:
        case "a flipped bit":
            weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
        case "a cut file":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "a lost file":
            weights.unlink()
        case _:
            (record,) = directory.parent.glob("*.json")
            record.write_bytes(b"{")
    assert contents(fetch_base(place, settings)) == _FILES


def test_what_a_dead_process_left_is_no_model_and_goes(
    place: str, settings: StorageSettings
) -> None:
    fetch_base(place, settings)
    root = settings.cache_dir / "bases"
    (record,) = root.glob("*.json")
    unfinished = root / f"~{record.stem}"
    record.unlink()
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert contents(fetch_base(place, settings)) == _FILES
    assert not list(root.glob("~*"))


def _fetch(place: str, settings: dict[str, Any]) -> dict[str, bytes]:
    return contents(fetch_base(place, StorageSettings(**settings)))


def test_processes_that_start_together_download_once_and_see_the_whole(
    place: str, settings: StorageSettings, server: S3Server
) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_fetch, [(place, settings.model_dump())] * 3)
    assert found == [_FILES] * 3
    # Each lists; the one that downloads reads every file and lists again.
    assert server.requests.count("GET") == 3 + len(_FILES) + 1


def test_an_object_that_changes_meanwhile_is_not_kept(
    place: str, settings: StorageSettings, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = place.removeprefix(f"s3://{_BUCKET}/")
    copy_file = base_download._copy
    for data, reason in ((b"[3, 4]", "the model at"), (b"[", "the object 'tokenizer.json'")):

        def copy(*arguments: Any, changed: bytes = data) -> FileEntry:
            put(server, f"{prefix}/tokenizer.json", changed)
            return copy_file(*arguments)

        monkeypatch.setattr("storage.base_download._copy", copy)
        with pytest.raises(StoreUnavailableError, match=f"{reason}.* changed while"):
            fetch_base(place, settings)
        monkeypatch.undo()
        assert not list((settings.cache_dir / "bases").glob("*.json"))
        put(server, f"{prefix}/tokenizer.json", _FILES["tokenizer.json"])
    assert contents(fetch_base(place, settings)) == _FILES


def test_a_failing_server_is_asked_again_and_a_dead_one_is_named(
    place: str, settings: StorageSettings, server: S3Server
) -> None:
    server.failures.extend([Failure("503 Slow Down", "SlowDown")] * 2)
    assert contents(fetch_base(place, settings)) == _FILES
    elsewhere = settings.model_copy(
        update={"s3_endpoint_url": "http://127.0.0.1:9", "s3_timeout_s": 0.2}
    )
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        fetch_base(place, elsewhere)


def test_a_gguf_object_is_named_or_the_only_one(
    settings: StorageSettings, server: S3Server
) -> None:
    put(server, "packed/a.gguf", b"GGUF a")
    assert contents(fetch_base(f"s3://{_BUCKET}/packed", settings)) == {"a.gguf": b"GGUF a"}
    put(server, "packed/b.gguf", b"GGUF b")
    with pytest.raises(
        InvalidRequestError, match=r"several GGUF files; name one of a\.gguf, b\.gguf"
    ):
        fetch_base(f"s3://{_BUCKET}/packed", settings)
    named = fetch_base(f"s3://{_BUCKET}/packed/b.gguf", settings)
    assert contents(named) == {"b.gguf": b"GGUF b"}


@pytest.mark.parametrize(
    ("url", "error", "reason"),
    [
        (f"s3://{_BUCKET}/nothing-here", InvalidRequestError, "there is no model at"),
        (f"s3://{_BUCKET}/nothing/a.gguf", InvalidRequestError, "there is no model at"),
        ("s3://", InvalidRequestError, "is not s3://bucket/prefix"),
        ("s3://no-such-bucket/x", StoreUnavailableError, "does not exist; create it first"),
    ],
)
def test_what_is_not_there_is_refused(
    settings: StorageSettings, url: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        fetch_base(url, settings)


def test_a_cache_that_cannot_be_written_is_named(place: str, settings: StorageSettings) -> None:
    settings.cache_dir.write_text("a file, not a directory")
    with pytest.raises(StoreUnavailableError, match=r"cannot be kept in storage\.cache_dir"):
        fetch_base(place, settings)
