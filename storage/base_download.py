"""A base model in S3, brought to this machine once and kept by its content.

    <cache_dir>/bases/<content>/<file>     content: the sha256 over the names and digests of all files
    <cache_dir>/bases/<listing>.json       which content a listing was, and the digest of every file
    <cache_dir>/bases/<listing>.lock       held while that listing is checked or downloaded
    <cache_dir>/bases/~<listing>/          being written, under the lock

A listing is a prefix with the names, sizes and times of its objects, so a model that was replaced there is another
listing. Files appear by one rename and are never changed; every use checks them against their digests first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from storage.config import StorageSettings
from storage.errors import AdapterCorruptError, InvalidRequestError, StoreUnavailableError
from storage.gguf_file import SUFFIX as GGUF
from storage.identity import canonical_json, sha256_hex
from storage.manifest import FileEntry
from storage.object_store import ObjectNotFoundError, ObjectStore
from storage.records import decode, encode
from storage.s3_store import S3ObjectStore

SCHEME = "s3://"
_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_CHUNK_BYTES = 16 << 20
_CONNECTIONS = 8
_log = logging.getLogger(__name__)

_Listing = Mapping[str, tuple[int, float]]  # file name → bytes, seconds since the epoch


class _Content(BaseModel):
    """The files of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        return sha256_hex(encode(self))


def fetch_base(url: str, settings: StorageSettings) -> Path:
    """The directory of a base model's files, downloaded if they are not here yet. Safe to call from many processes.

    Args:
        url: `s3://bucket/prefix` with config.json and *.safetensors or one *.gguf right below it, or the `.gguf`
            object itself.

    Raises:
        InvalidRequestError: there is no model there, or not just one.
        StoreUnavailableError: S3 cannot be reached, the files changed meanwhile, or the cache cannot be written.
    """
    bucket, _, prefix = url.removeprefix(SCHEME).strip("/").partition("/")
    if not url.startswith(SCHEME) or not bucket:
        raise _refused(f"{url} is not s3://bucket/prefix")
    only = None
    if prefix.endswith(GGUF):
        prefix, _, only = prefix.rpartition("/")
    store = S3ObjectStore(bucket, prefix, settings)
    listing = _list(store, url, only)
    key = sha256_hex(
        canonical_json([settings.s3_endpoint_url, bucket, prefix, sorted(listing.items())])
    )
    root = settings.cache_dir.expanduser().absolute() / "bases"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f"{key}.lock"):
            kept = _kept(root, key)
            if kept is None:
                kept = _download(store, url, only, listing, root, key)
            return kept
    except OSError as error:
        raise StoreUnavailableError(
            f"the model at {url} cannot be kept in storage.cache_dir: {error.strerror}"
        ) from error


def _list(store: ObjectStore, url: str, only: str | None) -> _Listing:
    """The objects that make the model; without GGUF files where it is in transformers' layout."""
    found = {
        one.key: (one.num_bytes, one.modified_s)
        for one in store.list(only or "")
        if "/" not in one.key
    }
    wanted = _SUFFIXES if "config.json" in found else _SUFFIXES | {GGUF}
    listing = {
        name: entry
        for name, entry in found.items()
        if name == only or (only is None and PurePosixPath(name).suffix in wanted)
    }
    ggufs = sorted(name for name in listing if name.endswith(GGUF))
    if len(ggufs) > 1:
        raise _refused(f"{url} holds several GGUF files; name one of {', '.join(ggufs)}")
    if not ggufs and "config.json" not in listing:
        raise _refused(
            f"there is no model at {url}: config.json and *.safetensors, or a .gguf file, are expected right below it"
        )
    for name in listing:
        if not _PLAIN_NAME.fullmatch(name):
            raise _refused(f"the object {name!r} at {url} has a name that is not a plain file name")
    return listing


def _kept(root: Path, key: str) -> Path | None:
    """The files of this listing, if they were downloaded before and nothing happened to them."""
    try:
        content = decode((root / f"{key}.json").read_bytes(), _Content, f"of the base {key}")
    except FileNotFoundError:
        return None
    except AdapterCorruptError as error:
        _log.warning("downloading a base model again: %s", error)
        return None
    return root / content.digest if _is_whole(root / content.digest, content) else None


def _download(
    store: ObjectStore, url: str, only: str | None, listing: _Listing, root: Path, key: str
) -> Path:
    unfinished = root / f"~{key}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died
    unfinished.mkdir()
    try:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            content = _Content(
                files={
                    name: _copy(store, name, num_bytes, unfinished / name, pool)
                    for name, (num_bytes, _) in sorted(listing.items())
                }
            )
        if _list(store, url, only) != listing:
            raise StoreUnavailableError(f"the model at {url} was changed while it was downloaded")
        kept = root / content.digest
        if not _is_whole(kept, content):
            _replace(unfinished, kept)
        record = root / f"~{key}.json"
        record.write_bytes(encode(content))
        record.replace(root / f"{key}.json")
        return kept
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy(
    store: ObjectStore, name: str, num_bytes: int, path: Path, pool: ThreadPoolExecutor
) -> FileEntry:
    """Several ranges at a time, written and hashed in their order."""
    digest = hashlib.sha256()

    def read(start: int) -> bytes:
        stop = min(start + _CHUNK_BYTES, num_bytes)
        try:
            data = store.get_range(name, start, stop)
        except ObjectNotFoundError:
            data = b""
        if len(data) != stop - start:
            raise StoreUnavailableError(f"the object {name!r} was changed while it was downloaded")
        return data

    at_once = _CHUNK_BYTES * _CONNECTIONS
    with path.open("wb") as file:
        for begin in range(0, num_bytes, at_once):
            starts = range(begin, min(begin + at_once, num_bytes), _CHUNK_BYTES)
            for data in pool.map(read, starts):
                file.write(data)
                digest.update(data)
    return FileEntry(sha256=digest.hexdigest(), num_bytes=num_bytes)


def _is_whole(directory: Path, content: _Content) -> bool:
    return directory.is_dir() and all(
        _entry(directory / name) == entry for name, entry in content.files.items()
    )


def _entry(path: Path) -> FileEntry | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(sha256=digest, num_bytes=path.stat().st_size)


def _replace(unfinished: Path, kept: Path) -> None:
    """Another listing may have the same content, and another process may put it there at this moment."""
    if kept.is_dir():  # damaged; who has its files open keeps them
        damaged = unfinished.with_name(f"{unfinished.name}.damaged")
        kept.rename(damaged)
        shutil.rmtree(damaged)
    try:
        unfinished.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process and thread at a time; the lock of a process that dies is free again."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(reason, param="base")
