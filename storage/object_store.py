"""The one thing the registry needs of a storage system: small objects with conditional writes.

Knows nothing of adapters. Implementations: `LocalObjectStore` (a directory) and `S3ObjectStore` (any S3 API).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

_KEY_PART = re.compile(r"[A-Za-z0-9._-]+")


class PreconditionFailedError(Exception):
    """A conditional write lost its race: somebody else wrote first. Nothing was changed by this call."""


class ObjectNotFoundError(LookupError):
    """No object under that key."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object's bytes and the tag that `compare_and_swap` takes to replace exactly this state."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One entry of a listing; `modified_s` is seconds since the epoch by the store's clock.

    `stamp` is another one after every write that changed the object; it compares with those of other listings only.
    """

    key: str
    num_bytes: int
    modified_s: float
    stamp: str


def checked_key(key: str) -> str:
    """An object's key, unchanged. Raises ValueError: a bad key is a mistake of the caller, not of a user."""
    parts = key.split("/")
    if not all(_KEY_PART.fullmatch(part) and part not in {".", ".."} for part in parts):
        raise ValueError(f"{key!r} is not an object key")
    return key


@runtime_checkable
class ObjectStore(Protocol):
    """Keys are `/`-separated, of `[A-Za-z0-9._-]` parts, never absolute and never with a `.` or `..` part, and no
    key is the folder of another. An etag names an object's content, so a state that comes back has its old etag:
    whoever must tell the two apart puts a counter into the object, as aliases do.

    Every method raises `StoreUnavailableError` when the store cannot be reached, and is safe to call from any
    thread or process. A write that returned is durable; a write that died half-way left the old state.
    """

    def get(self, key: str) -> StoredObject:
        """Raises ObjectNotFoundError."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object; shorter when the object ends first. Raises ObjectNotFoundError."""

    def put(self, key: str, data: bytes) -> None:
        """Write unconditionally. For content-addressed blobs, and objects that only one process ever writes:
        everything else has a conditional write.
        """

    def put_if_absent(self, key: str, data: bytes) -> str:
        """Create the object, return its etag. Raises PreconditionFailedError if it exists, with any content."""

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        """Replace exactly the state tagged `etag`, return the new etag.

        Raises PreconditionFailedError if the object changed since or is gone.
        """

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in key order."""

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is already gone."""
