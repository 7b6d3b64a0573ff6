"""Where API keys are kept: `keys/<id>.json` in the registry's store, which every ingress reads."""

from __future__ import annotations

import logging
import re

from cluster.keys import ApiKey, KeyRing, UnknownKeyError
from storage.errors import AdapterCorruptError
from storage.object_store import ObjectStore
from storage.records import encode, read

_FOLDER = "keys/"
_RECORD = re.compile(rf"{_FOLDER}([0-9a-f]{{12}})\.json")

_log = logging.getLogger(__name__)


class KeyStore:
    """Every method raises StoreUnavailableError when the store cannot be reached. One caller at a time."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._read: dict[str, ApiKey] = {}  # a key never changes, so it is read once

    def add(self, key: ApiKey) -> None:
        self._store.put_if_absent(_place(key.key_id), encode(key))

    def keys(self) -> list[ApiKey]:
        """All keys, oldest first. A damaged record opens nothing and is left out, as are objects that are no keys."""
        records = [_RECORD.fullmatch(entry.key) for entry in self._store.list(_FOLDER)]
        found = {}
        for key_id in (record[1] for record in records if record is not None):
            key = self._read.get(key_id) or self._load(key_id)
            if key is not None:
                found[key_id] = key
        self._read = found
        return sorted(found.values(), key=lambda key: key.created_s)

    def ring(self) -> KeyRing:
        return KeyRing(self.keys())

    def revoke(self, key_id: str) -> None:
        """The key opens nothing any more. Raises UnknownKeyError when there is none with that id."""
        if not (key_id.isalnum() and key_id.isascii() and self._store.exists(_place(key_id))):
            raise UnknownKeyError(f"there is no key {key_id!r}", param="key_id")
        self._store.delete(_place(key_id))

    def _load(self, key_id: str) -> ApiKey | None:
        try:
            key = read(self._store, _place(key_id), ApiKey)
        except AdapterCorruptError as error:
            _log.error("a key is left out: %s", error.message)
            return None
        return key if key is not None and key.key_id == key_id else None


def _place(key_id: str) -> str:
    return f"{_FOLDER}{key_id}.json"
