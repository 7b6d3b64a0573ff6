"""A store in front of another one, for tests to get between a caller and its store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from storage.object_store import ObjectInfo, ObjectStore, StoredObject


class PassingStore:
    """Passes everything on. Subclasses change one thing."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def before(self, *, is_write: bool) -> None:
        """Called before every operation is passed on."""

    def get(self, key: str) -> StoredObject:
        self.before(is_write=False)
        return self.store.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self.before(is_write=False)
        return self.store.get_range(key, start, stop)

    def put(self, key: str, data: bytes) -> None:
        self.before(is_write=True)
        self.store.put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> str:
        self.before(is_write=True)
        return self.store.put_if_absent(key, data)

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        self.before(is_write=True)
        return self.store.compare_and_swap(key, data, etag)

    def exists(self, key: str) -> bool:
        self.before(is_write=False)
        return self.store.exists(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.before(is_write=False)
        return self.store.list(prefix)

    def delete(self, key: str) -> None:
        self.before(is_write=True)
        self.store.delete(key)


class InterruptingStore(PassingStore):
    """Lets something else happen, from beginning to end, just before one operation of its caller."""

    def __init__(self, store: ObjectStore, at: int, happen: Callable[[], object]) -> None:
        super().__init__(store)
        self._operations_left = at
        self._happen = happen
        self.has_happened = False

    def before(self, *, is_write: bool) -> None:
        if self._operations_left == 0:
            self.has_happened = True
            self._happen()
        self._operations_left -= 1
