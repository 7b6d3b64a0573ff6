"""Places outside the registry that an adapter may be taken from: only those the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deployments.errors import ForbiddenSourceError, NothingThereError
from storage.adapter_directory import ADAPTER_FILES, read_directory
from storage.config import StorageSettings
from storage.errors import AdapterRefusedError, InvalidRequestError
from storage.s3_store import S3ObjectStore

_S3 = "s3://"


class AdapterSources:
    """Reads directories on this machine and prefixes in S3, as far as they are allowed.

    Args:
        allowed: absolute directories and `s3://bucket/prefix`; what lies below one is allowed with it.
        storage: endpoint and limits; S3 is reached as the registry is.
    """

    def __init__(self, allowed: Sequence[str], storage: StorageSettings) -> None:
        self._prefixes = [place.rstrip("/") for place in allowed if place.startswith(_S3)]
        self._directories = [
            Path(place).resolve() for place in allowed if not place.startswith(_S3)
        ]
        self._storage = storage

    def read(self, location: str) -> dict[str, bytes]:
        """The files of the adapter at a location, by name. Blocks.

        Raises:
            ForbiddenSourceError: the location is not below an allowed one.
            NothingThereError: there is no adapter.
            AdapterRefusedError: it is larger than what is accepted.
            StoreUnavailableError: S3 cannot be reached.
        """
        if location.startswith(_S3):
            return self._read_s3(location.rstrip("/"))
        if "://" in location:
            raise InvalidRequestError(
                f"{location!r} is neither a directory nor s3://bucket/prefix", param="source"
            )
        return self._read_directory(location)

    def _read_s3(self, location: str) -> dict[str, bytes]:
        parts = location.removeprefix(_S3).split("/")
        is_plain = all(part not in ("", ".", "..") for part in parts)
        if not is_plain or not any(_is_below(location, place) for place in self._prefixes):
            raise _forbidden(location)
        store = S3ObjectStore(parts[0], "/".join(parts[1:]), self._storage)
        sizes = {
            found.key: found.num_bytes for found in store.list("") if found.key in ADAPTER_FILES
        }
        self._check_size(location, sum(sizes.values()))
        if not sizes:
            raise _nothing_there(location)
        return {name: store.get(name).data for name in sizes}

    def _read_directory(self, location: str) -> dict[str, bytes]:
        # Links are followed first: one that leads out of an allowed directory is not below it.
        path = Path(location).resolve()
        if not Path(location).is_absolute() or not any(
            path.is_relative_to(directory) for directory in self._directories
        ):
            raise _forbidden(location)
        files = [path / name for name in ADAPTER_FILES if (path / name).is_file()]
        if not files:
            raise _nothing_there(location)
        if any(file.is_symlink() and file.resolve().parent != path for file in files):
            raise _forbidden(location)
        self._check_size(location, sum(file.stat().st_size for file in files))
        return read_directory(path)

    def _check_size(self, location: str, num_bytes: int) -> None:
        if num_bytes > self._storage.max_adapter_bytes:
            raise AdapterRefusedError(
                f"the adapter at {location} has {num_bytes:,} bytes; at most "
                f"{self._storage.max_adapter_bytes:,} are accepted"
            )


def _is_below(location: str, place: str) -> bool:
    return location == place or location.startswith(f"{place}/")


def _forbidden(location: str) -> ForbiddenSourceError:
    return ForbiddenSourceError(
        f"{location} is not below a place this server takes adapters from (setting serve.adapter_sources)",
        param="source",
    )


def _nothing_there(location: str) -> NothingThereError:
    return NothingThereError(
        f"no adapter found at {location}: {' and '.join(ADAPTER_FILES)} are expected",
        param="source",
    )
