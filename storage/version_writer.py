"""How a version comes to exist: its files first, its manifest last, and garbage collection kept away from both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from storage import layout
from storage.adapter_records import read_manifest
from storage.errors import OverloadedError, UnknownModelError
from storage.identity import AdapterName, canonical_json, sha256_hex
from storage.manifest import Manifest, ManifestContent, Tombstone
from storage.object_store import ObjectStore, PreconditionFailedError
from storage.records import encode, swap
from storage.sweep import was_swept

_ATTEMPTS = 5


def write_version(
    store: ObjectStore,
    name: AdapterName,
    files: Mapping[str, bytes],
    manifest: Manifest,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Let a version exist, undeleted and out of quarantine, with all its files. May be repeated after any error.

    Args:
        clock: seconds since the epoch.
        sleep: how to wait for a garbage collection that is taking away what is written here.

    Raises:
        AdapterCorruptError: there is another manifest in its place.
        OverloadedError: a garbage collection is in the way again and again.
    """
    for _ in range(_ATTEMPTS):
        # Twice: a publisher that is killed after its commit must not leave a version without its files.
        blobs = _write_blobs(store, files, manifest.content)
        if was_swept(store, blobs, clock, sleep):
            continue
        manifest_key = _commit(store, name, manifest)
        if not was_swept(store, (*blobs, manifest_key), clock, sleep):
            return
    raise OverloadedError("garbage collection is at work on these files; try again")


def _write_blobs(
    store: ObjectStore, files: Mapping[str, bytes], content: ManifestContent
) -> tuple[str, ...]:
    blobs = {layout.blob(sha256_hex(data)): data for data in files.values()}
    blobs[layout.blob(content.version)] = canonical_json(content.model_dump(mode="json"))
    # Blobs are written even if they exist: their new time keeps garbage collection away from them.
    for key, data in blobs.items():
        store.put(key, data)
    return tuple(blobs)


def _commit(store: ObjectStore, name: AdapterName, manifest: Manifest) -> str:
    """Returns the manifest's key."""
    version = manifest.version
    key = layout.manifest(name, version)
    try:
        store.put_if_absent(key, encode(manifest))
    except PreconditionFailedError:
        with suppress(UnknownModelError):  # collected since: `was_swept` tells
            read_manifest(store, name, version)

    def revive(tombstone: Tombstone | None) -> Tombstone | None:
        is_deleted = tombstone is not None and version in tombstone.versions
        return tombstone.without(version) if tombstone is not None and is_deleted else None

    swap(store, layout.tombstone(name), Tombstone, revive)
    if store.exists(layout.quarantine(version)):
        store.delete(layout.quarantine(version))
    return key
