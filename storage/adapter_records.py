"""One adapter's records in the object store, as they are: manifests, aliases, tombstone. Writes nothing.

Whoever reads several of them reads aliases first, then the tombstone, then versions: an alias is moved after its
version exists, so what an alias means is then found as well.
"""

from __future__ import annotations

from storage import layout
from storage.errors import AdapterCorruptError, AliasTakenError, UnknownModelError
from storage.history import live_record
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import AliasRecord, Manifest, Tombstone
from storage.object_store import ObjectStore
from storage.records import read

NOTHING_DELETED = Tombstone(deleted_s=0.0)

_SHORT_DIGITS = 12


def read_tombstone(store: ObjectStore, name: AdapterName) -> Tombstone:
    return read(store, layout.tombstone(name), Tombstone) or NOTHING_DELETED


def read_alias_records(store: ObjectStore, name: AdapterName) -> dict[str, AliasRecord]:
    """Every alias record, also of aliases that a delete took away."""
    records = {}
    for entry in store.list(layout.aliases_folder(name)):
        alias = layout.parse_alias(entry.key)
        record = None if alias is None else read(store, entry.key, AliasRecord)
        if alias is not None and record is not None:
            records[alias] = record
    return records


def read_aliases(store: ObjectStore, name: AdapterName) -> dict[str, AliasRecord]:
    """What each alias means now."""
    records = read_alias_records(store, name)
    tombstone = read_tombstone(store, name)
    live = {alias: live_record(alias, record, tombstone) for alias, record in records.items()}
    return {alias: record for alias, record in live.items() if record is not None}


def list_versions(
    store: ObjectStore, name: AdapterName, tombstone: Tombstone, start: str = ""
) -> list[AdapterVersion]:
    """The versions whose digits begin with `start`, without deleted ones."""
    found = []
    for entry in store.list(layout.versions_folder(name) + start):
        parsed = layout.parse_manifest(entry.key)
        if parsed is not None and parsed[1] not in tombstone.versions:
            found.append(parsed[1])
    return found


def read_manifest(store: ObjectStore, name: AdapterName, version: AdapterVersion) -> Manifest:
    """Raises UnknownModelError when there is none, AdapterCorruptError when it is another version's."""
    manifest = read(store, layout.manifest(name, version), Manifest)
    if manifest is None:
        raise no_version(name, version)
    if manifest.version != version:
        raise AdapterCorruptError(
            f"the manifest of adapter {name.name!r} version {version} is damaged"
        )
    return manifest


def no_version(name: AdapterName, version: AdapterVersion) -> UnknownModelError:
    return UnknownModelError(f"the adapter {name.name!r} has no version {version}", param="model")


def alias_taken(name: AdapterName, alias: str, version: AdapterVersion) -> AliasTakenError:
    short = version[:_SHORT_DIGITS]
    return AliasTakenError(
        f"an adapter {name.name!r} was made by somebody else meanwhile, and this one may not take its place; it is "
        f"kept, and answers as {name.name}@{short}. With an admin key the alias {alias!r} can be moved to it: flora "
        f"adapters alias {name.name} {alias} {short}"
    )


def no_adapter(name: AdapterName) -> UnknownModelError:
    return UnknownModelError(f"the adapter {name.name!r} does not exist", param="model")
