"""Places adapters are taken from, as PEFT saves them: a directory on this machine, or a prefix in S3."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Protocol

from storage.adapter_directory import ADAPTER_FILES, read_directory
from storage.config import StorageSettings
from storage.errors import AdapterRefusedError, InvalidRequestError, NoAdapterError
from storage.object_store import ObjectNotFoundError
from storage.s3_store import S3ObjectStore

S3_SCHEME = "s3://"


class AdapterSource(Protocol):
    """Adapters below one place. Folders are `/`-separated and relative to it; "" is the place itself."""

    def folders(self) -> list[str]:
        """Every folder that holds an adapter, in order."""

    def read(self, folder: str) -> dict[str, bytes]:
        """The adapter's files by name. Raises NoAdapterError, or AdapterRefusedError when it is too large."""


def open_source(place: str, settings: StorageSettings) -> AdapterSource:
    """What `place` names: a directory or s3://bucket[/prefix], reached with the registry's endpoint and credentials.

    Raises:
        InvalidRequestError: it is neither.
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        if not Path(place).is_dir():
            raise InvalidRequestError(f"{place} is not a directory", param="source")
        return _Directory(Path(place), settings.max_adapter_bytes)
    bucket, _, prefix = rest.strip("/").partition("/")
    if f"{scheme}://" != S3_SCHEME or not bucket:
        raise InvalidRequestError(
            f"{place!r} is neither a directory nor s3://bucket/prefix", param="source"
        )
    return _S3Prefix(place, S3ObjectStore(bucket, prefix, settings), settings.max_adapter_bytes)


class _Directory:
    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def folders(self) -> list[str]:
        found = {
            file.parent.relative_to(self._root)
            for name in ADAPTER_FILES
            for file in self._root.rglob(name)
            if file.is_file()
        }
        return sorted("" if folder == Path() else folder.as_posix() for folder in found)

    def read(self, folder: str) -> dict[str, bytes]:
        path = self._root / folder
        files = [path / name for name in ADAPTER_FILES]
        _check_size(sum(file.stat().st_size for file in files if file.is_file()), self._max_bytes)
        return read_directory(path)


class _S3Prefix:
    def __init__(self, place: str, store: S3ObjectStore, max_bytes: int) -> None:
        self._place = place
        self._store = store
        self._max_bytes = max_bytes

    def folders(self) -> list[str]:
        found = {
            PurePosixPath(each.key).parent
            for each in self._store.list("")
            if PurePosixPath(each.key).name in ADAPTER_FILES
        }
        return sorted("" if folder == PurePosixPath() else str(folder) for folder in found)

    def read(self, folder: str) -> dict[str, bytes]:
        prefix = f"{folder}/" if folder else ""
        wanted = {f"{prefix}{name}": name for name in ADAPTER_FILES}
        listed = {
            each.key: each.num_bytes for each in self._store.list(prefix) if each.key in wanted
        }
        if not listed:
            raise NoAdapterError(
                f"{self._place} holds no adapter: {' and '.join(ADAPTER_FILES)} are expected"
            )
        _check_size(sum(listed.values()), self._max_bytes)
        try:
            return {wanted[key]: self._store.get(key).data for key in listed}
        except ValueError as error:
            raise AdapterRefusedError(
                f"the folder {folder!r} has characters that are not supported"
            ) from error
        except ObjectNotFoundError as error:
            raise AdapterRefusedError(f"{error} was removed while it was read") from error


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise AdapterRefusedError(
            f"the adapter has {num_bytes:,} bytes; at most {max_bytes:,} are accepted"
        )
