"""A store that proves its conditional writes before the first write rather than when it is opened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from storage.object_store import ObjectInfo, ObjectStore, StoredObject


class ProbedStore:
    """For processes that must come up while the store is away, and may write once it is back. An `ObjectStore`.

    Args:
        probe: raises `StoreUnavailableError` when the store cannot be used; called before writes until it passes.
    """

    def __init__(self, store: ObjectStore, probe: Callable[[ObjectStore], None]) -> None:
        self._store = store
        self._probe = probe
        self._probing = threading.Lock()
        self._has_passed = False

    def get(self, key: str) -> StoredObject:
        return self._store.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self._store.get_range(key, start, stop)

    def exists(self, key: str) -> bool:
        return self._store.exists(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def put(self, key: str, data: bytes) -> None:
        self._proven().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._proven().put_if_absent(key, data)

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        return self._proven().compare_and_swap(key, data, etag)

    def delete(self, key: str) -> None:
        self._proven().delete(key)

    def _proven(self) -> ObjectStore:
        with self._probing:
            if not self._has_passed:
                self._probe(self._store)
                self._has_passed = True
        return self._store
