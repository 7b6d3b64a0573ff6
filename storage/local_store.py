"""The embedded object store: a directory on one machine, with the promises of S3's conditional writes.

A write goes to a temporary file that is made durable first and then renamed into place, so a reader sees the old
bytes or the new ones and a killed writer leaves only a temporary file. Conditional writes hold one lock over
"look, then rename"; the kernel drops it when its owner dies. Not for a directory that several machines mount.

    <root>/<key>        an object
    <root>/~writing/    files not yet renamed      (`~` cannot occur in a key)
    <root>/~lock
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.errors import StoreUnavailableError
from storage.object_store import (
    ObjectInfo,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoredObject,
    checked_key,
)

_ABANDONED_AFTER_S = 24 * 3600.0
_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalObjectStore:
    """An `ObjectStore` under `root`, which is created if it is missing. Etags are sha256 digests."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self._writing = self._root / "~writing"
        self._lock = self._root / "~lock"
        with _reporting("opened"):
            self._writing.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
            self._remove_abandoned()

    def get(self, key: str) -> StoredObject:
        path = self._path(key)
        with _reporting("read"):
            try:
                data = path.read_bytes()
            except _NO_SUCH_FILE:
                raise ObjectNotFoundError(key) from None
        return StoredObject(data, _etag(data))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        path = self._path(key)
        with _reporting("read"):
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    return file.read(max(0, stop - start))
            except _NO_SUCH_FILE:
                raise ObjectNotFoundError(key) from None

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _reporting("written"), self._durable_copy(data) as copy:
            _rename(copy, path)

    def put_if_absent(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with _reporting("written"), self._durable_copy(data) as copy, self._locked():
            if path.exists():
                raise PreconditionFailedError(key)
            _rename(copy, path)
        return _etag(data)

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        path = self._path(key)
        with _reporting("written"), self._durable_copy(data) as copy, self._locked():
            try:
                current = path.read_bytes()
            except _NO_SUCH_FILE:
                raise PreconditionFailedError(key) from None
            if _etag(current) != etag:
                raise PreconditionFailedError(key)
            _rename(copy, path)
        return _etag(data)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _reporting("read"):
            return path.is_file()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder_key = prefix[: prefix.rfind("/") + 1]
        with suppress(ValueError):  # no key begins like that
            folder = self._path(folder_key[:-1]) if folder_key else self._root
            with _reporting("listed"):
                yield from self._walk(folder, folder_key, prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _reporting("written"), self._locked():
            try:
                path.unlink()
            except _NO_SUCH_FILE:
                return
            _sync_directory(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    @contextmanager
    def _durable_copy(self, data: bytes) -> Iterator[Path]:
        """A temporary file with these bytes on disk; gone afterwards unless it was renamed."""
        copy = self._writing / uuid.uuid4().hex
        try:
            with copy.open("xb") as file:
                file.write(data)
                file.flush()
                # The kernel's own stamps are some milliseconds coarse: two writes could look like one.
                os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
                os.fsync(file.fileno())
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A descriptor of its own per holder: flock then also excludes other threads of this process.
        with self._lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _walk(self, folder: Path, folder_key: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as entries:
                # A folder sorts with its slash: key order is the order of the whole keys, as in S3.
                found = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in found:
            key = folder_key + name
            if name.startswith("~"):
                continue
            if name.endswith("/"):
                if key.startswith(prefix):
                    yield from self._walk(Path(entry.path), key, prefix)
            elif key.startswith(prefix):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    status = entry.stat()
                    stamp = f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"
                    yield ObjectInfo(key, status.st_size, status.st_mtime, stamp)

    def _remove_abandoned(self) -> None:
        oldest = time.time() - _ABANDONED_AFTER_S
        for path in self._writing.iterdir():
            with suppress(FileNotFoundError):  # another process tidies up too
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _rename(copy: Path, path: Path) -> None:
    _make_directories(path.parent)
    copy.replace(path)
    _sync_directory(path.parent)


def _make_directories(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_directories(directory.parent)
    directory.mkdir(exist_ok=True)
    _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    """A rename is durable only once the directory that holds the name is."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reporting(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(
            f"the registry's directory cannot be {done}: {error.strerror or error}"
        ) from error
