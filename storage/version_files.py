"""The bytes of a version, by digest: its content and its files, never others than their digests say."""

from __future__ import annotations

from storage import layout
from storage.errors import AdapterCorruptError, UnknownModelError
from storage.identity import AdapterVersion, checked_version, sha256_hex
from storage.load_stages import StageClock
from storage.manifest import FileEntry, ManifestContent
from storage.object_store import ObjectNotFoundError, ObjectStore
from storage.ranged_reads import read_object
from storage.records import decode


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(sha256=sha256_hex(data), num_bytes=len(data))


def read_content(store: ObjectStore, version: AdapterVersion) -> ManifestContent:
    """Raises UnknownModelError when it is not there, AdapterCorruptError when it is damaged."""
    try:
        data = store.get(layout.blob(checked_version(version))).data
    except ObjectNotFoundError:
        raise UnknownModelError(
            f"the adapter version {version} does not exist", param="model"
        ) from None
    if sha256_hex(data) != version:
        raise AdapterCorruptError(f"the stored description of version {version} is damaged")
    return decode(data, ManifestContent, f"version {version}")


def read_file(store: ObjectStore, entry: FileEntry, stages: StageClock) -> bytes:
    """Raises AdapterCorruptError when it is missing, or damaged."""
    try:
        with stages.stage("registry"):
            data = read_object(store, layout.blob(entry.sha256), entry.num_bytes)
    except ObjectNotFoundError:
        raise AdapterCorruptError(f"the stored file {entry.sha256} is missing") from None
    with stages.stage("digest"):
        is_whole = entry_of(data) == entry
    if not is_whole:
        raise AdapterCorruptError(f"the stored file {entry.sha256} is damaged")
    return data
