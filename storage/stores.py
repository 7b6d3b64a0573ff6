"""The one way to a store: from settings, checked before it is trusted."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from storage import layout
from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore, PreconditionFailedError
from storage.probed_store import ProbedStore
from storage.s3_store import S3ObjectStore


def open_store(settings: StorageSettings) -> ObjectStore:
    """The store that `settings.registry` names, after a probe of its conditional writes.

    Raises:
        InvalidRequestError: `registry` is neither a directory nor `s3://bucket[/prefix]`.
        StoreUnavailableError: it cannot be reached or written, or it ignores conditions on writes.
    """
    store = _connect(settings)
    check_conditional_writes(store)
    return store


def open_store_to_read(settings: StorageSettings) -> ObjectStore:
    """The same store for who never writes to it: it may be away, and is not probed. Raises InvalidRequestError."""
    return _connect(settings)


def open_store_when_used(settings: StorageSettings) -> ObjectStore:
    """The same store for who may have to start while it is away: it is probed before the first write.

    Raises InvalidRequestError; every write raises StoreUnavailableError as `open_store` does until the probe passes.
    """
    return ProbedStore(_connect(settings), check_conditional_writes)


def check_conditional_writes(store: ObjectStore) -> None:
    """Prove on one object of its own that a lost race is reported; remove the object again.

    Some S3 servers accept the condition headers and overwrite all the same. On such a store two publishers would
    lose each other's work without an error.

    Raises:
        StoreUnavailableError: the store cannot be used, and the message says why.
    """
    key = f"{layout.PROBES}{uuid.uuid4().hex}"
    first = store.put_if_absent(key, b"1")
    try:
        _must_lose(lambda: store.put_if_absent(key, b"2"), "If-None-Match")
        second = store.compare_and_swap(key, b"3", first)
        _must_lose(lambda: store.compare_and_swap(key, b"4", first), "If-Match")
        if store.get(key).data != b"3":
            raise StoreUnavailableError("the registry's store does not return what was written")
        store.delete(key)
        _must_lose(
            lambda: store.compare_and_swap(key, b"5", second), "If-Match on a deleted object"
        )
    except PreconditionFailedError:
        raise StoreUnavailableError(
            "the registry's store refuses a conditional write (If-Match) that should succeed"
        ) from None
    finally:
        store.delete(key)


def _connect(settings: StorageSettings) -> ObjectStore:
    scheme, separator, rest = settings.registry.partition("://")
    if not separator:
        return LocalObjectStore(Path(settings.registry))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise InvalidRequestError(
            f"the registry {settings.registry!r} is neither a directory nor s3://bucket/prefix",
            param="registry",
        )
    return S3ObjectStore(bucket, prefix, settings)


def _must_lose(write: Callable[[], str], condition: str) -> None:
    try:
        write()
    except PreconditionFailedError:
        return
    raise StoreUnavailableError(
        f"the registry's store ignores conditional writes ({condition}), so concurrent publishers would overwrite "
        "each other; use a directory, AWS S3, or an S3 server that enforces them (recent MinIO, Ceph, Garage)"
    )
