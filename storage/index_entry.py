"""What the index says of one adapter, and how that is made from the adapter's records. Writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from storage import layout
from storage.adapter_records import NOTHING_DELETED, read_manifest, read_tombstone
from storage.errors import AdapterCorruptError, UnknownModelError
from storage.history import live_record, versions_of
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import AliasRecord, Pin, Tombstone
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import read
from storage.summary import VersionSummary

_log = logging.getLogger(__name__)


class AliasEntry(BaseModel):
    """What an alias means, and what it meant before, newest first. Deleted versions are left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: AdapterVersion
    generation: int
    earlier: tuple[AdapterVersion, ...] = ()

    @classmethod
    def of(cls, record: AliasRecord) -> Self:
        head, *earlier = versions_of(record)
        return cls(version=head, generation=record.generation, earlier=tuple(earlier))


class AdapterEntry(BaseModel):
    """One adapter of the index. It stays, without versions, when the adapter is deleted.

    `revision` counts the writes of this entry. `stamps` are those of the records it was made from, by key: while they
    and the manifests that are there stay the same, so does the entry.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: int
    versions: tuple[VersionSummary, ...] = Field(default=(), description="Oldest first.")
    deleted: tuple[AdapterVersion, ...] = Field(
        default=(), description="Deleted, with manifests that are still there."
    )
    aliases: dict[str, AliasEntry] = {}
    pinned_copies: int = 0
    stamps: dict[str, str] = {}

    def is_made_from(self, name: AdapterName, objects: Iterable[ObjectInfo]) -> bool:
        """Whether a listing of the adapter's objects shows what the entry was made from."""
        found = {each.key: each.stamp for each in objects}
        versions = (*(summary.version for summary in self.versions), *self.deleted)
        known = {layout.manifest(name, version) for version in versions} | self.stamps.keys()
        return known == found.keys() and all(
            found[key] == stamp for key, stamp in self.stamps.items()
        )


class Shard(BaseModel):
    """`index/adapters/<two hex digits>.json`: the entries of some adapters, by `tenant/name`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    adapters: dict[str, AdapterEntry] = {}


def by_adapter(objects: Iterable[ObjectInfo]) -> dict[AdapterName, list[ObjectInfo]]:
    """A listing below `adapters/` by the adapter each object belongs to; without objects that are nobody's."""
    found: dict[AdapterName, list[ObjectInfo]] = {}
    for each in objects:
        manifest = layout.parse_manifest(each.key)
        name = layout.parse_record(each.key) if manifest is None else manifest[0]
        if name is not None:
            found.setdefault(name, []).append(each)
    return found


def make_entry(
    store: ObjectStore,
    name: AdapterName,
    objects: Iterable[ObjectInfo],
    old: AdapterEntry | None,
    *,
    rereads: bool = False,
) -> AdapterEntry:
    """The entry as the store has it now; equal to `old` where nothing changed, of the next revision where it did.

    Args:
        objects: the adapter's, listed before.
        old: manifests of versions that it has are not read again, unless `rereads`.

    Raises:
        AdapterCorruptError: a record other than a manifest is damaged.
    """
    listed = {each.key: each.stamp for each in objects}
    stamps = {key: stamp for key, stamp in listed.items() if layout.parse_manifest(key) is None}
    records = {}
    for key in stamps:
        alias = layout.parse_alias(key)
        record = None if alias is None else read(store, key, AliasRecord)
        if alias is not None and record is not None:
            records[alias] = record
    has_tombstone = layout.tombstone(name) in stamps
    tombstone = read_tombstone(store, name) if has_tombstone else NOTHING_DELETED
    pin = read(store, layout.pin(name), Pin) if layout.pin(name) in stamps else None
    live = {alias: live_record(alias, record, tombstone) for alias, record in records.items()}
    aliases = {alias: AliasEntry.of(record) for alias, record in sorted(live.items()) if record}

    there = [parsed[1] for key in listed if (parsed := layout.parse_manifest(key))]
    # An alias may have been moved, after the listing, to a version that is newer than the listing.
    meant = [alias.version for alias in aliases.values()]
    known = {}
    if old is not None and not rereads:
        known = {summary.version: summary for summary in old.versions}
    versions = _summaries(store, name, dict.fromkeys([*there, *meant]), tombstone, known)
    unreadable = set(there).difference(tombstone.versions, versions)
    stamps |= {key: listed[key] for key in (layout.manifest(name, each) for each in unreadable)}
    entry = AdapterEntry(
        revision=0 if old is None else old.revision,
        versions=tuple(sorted(versions.values(), key=lambda each: (each.created_s, each.version))),
        deleted=tuple(sorted(set(there).intersection(tombstone.versions))),
        aliases=aliases,
        pinned_copies=0 if pin is None or not versions else pin.copies,
        stamps=stamps,
    )
    return entry if entry == old else entry.model_copy(update={"revision": entry.revision + 1})


def _summaries(
    store: ObjectStore,
    name: AdapterName,
    versions: Iterable[AdapterVersion],
    tombstone: Tombstone,
    known: Mapping[AdapterVersion, VersionSummary],
) -> dict[AdapterVersion, VersionSummary]:
    """Of the versions that are not deleted and can be read."""
    found = {}
    for version in versions:
        if version in tombstone.versions:
            continue
        try:
            found[version] = known.get(version) or VersionSummary.of(
                read_manifest(store, name, version)
            )
        except UnknownModelError:  # collected, or deleted by hand
            continue
        except AdapterCorruptError as error:
            _log.error("left out of the index: %s", error.message)
    return found
