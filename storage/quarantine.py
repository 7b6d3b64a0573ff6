"""Which versions must not be served because their stored bytes are damaged. By version, under whatever name."""

from __future__ import annotations

from storage import layout
from storage.identity import AdapterVersion
from storage.manifest import Quarantine
from storage.object_store import ObjectStore
from storage.records import read, swap


def put_in_quarantine(
    store: ObjectStore, version: AdapterVersion, reason: str, now_s: float
) -> None:
    """The first reason stands."""
    record = Quarantine(reason=reason, since_s=now_s)
    swap(store, layout.quarantine(version), Quarantine, lambda old: None if old else record)


def is_in_quarantine(store: ObjectStore, version: AdapterVersion) -> bool:
    return store.exists(layout.quarantine(version))


def reason_of(store: ObjectStore, version: AdapterVersion) -> str | None:
    """Why a version is in quarantine; None when it is not."""
    record = read(store, layout.quarantine(version), Quarantine)
    return None if record is None else record.reason


def read_quarantined(store: ObjectStore) -> dict[AdapterVersion, str]:
    """Every version in quarantine, and why."""
    found = {}
    for entry in store.list(layout.QUARANTINE):
        version = layout.parse_quarantine(entry.key)
        reason = None if version is None else reason_of(store, version)
        if version is not None and reason is not None:
            found[version] = reason
    return found
