"""Which versions must not be served because their stored bytes are damaged: by version, under whatever name."""

from __future__ import annotations

from storage import layout
from storage.errors import AdapterCorruptError, UnknownModelError
from storage.identity import AdapterVersion
from storage.load_stages import StageClock
from storage.manifest import Quarantine
from storage.object_store import ObjectStore
from storage.records import read, swap
from storage.version_files import read_content, read_file


def quarantine_if_damaged(
    store: ObjectStore, version: AdapterVersion, reason: str, now_s: float
) -> bool:
    """Read a version's files, and put it into quarantine or take it out; whether it is in. The first reason stands.

    Raises:
        UnknownModelError: there is no such version under any name.
    """
    # Before the record is written: a caller that is stopped half way leaves no whole version in quarantine.
    is_damaged = not is_undamaged(store, version)
    if is_damaged:
        record = Quarantine(reason=reason, since_s=now_s)
        swap(store, layout.quarantine(version), Quarantine, lambda old: None if old else record)
        # Again, for a publisher may have repaired the files; from here on it takes the record away itself.
        is_damaged = not is_undamaged(store, version)
    if not is_damaged:
        store.delete(layout.quarantine(version))
    return is_damaged


def is_undamaged(store: ObjectStore, version: AdapterVersion) -> bool:
    """Whether every stored byte of a version is what its digests say. Reads all of them.

    Raises:
        UnknownModelError: there is no such version under any name.
    """
    try:
        for entry in read_content(store, version).files.values():
            read_file(store, entry, StageClock())
    except AdapterCorruptError:
        return False
    except UnknownModelError:
        if not _has_manifest(store, version):
            raise
        return False
    return True


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


def _has_manifest(store: ObjectStore, version: AdapterVersion) -> bool:
    parsed = (layout.parse_manifest(found.key) for found in store.list(layout.ADAPTERS))
    return any(manifest is not None and manifest[1] == version for manifest in parsed)
