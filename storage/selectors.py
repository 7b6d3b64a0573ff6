"""What the part of a model id after the adapter's name means: an alias, a version, or the start of one."""

from __future__ import annotations

from collections.abc import Sequence

from storage import layout
from storage.adapter_records import list_versions, no_adapter, read_tombstone
from storage.errors import AdapterCorruptError, AmbiguousModelError, UnknownModelError
from storage.history import live_record, newest_good, versions_of
from storage.identity import VERSION_PREFIX, VERSION_START, AdapterName, AdapterVersion, is_name
from storage.manifest import AliasRecord, Tombstone
from storage.object_store import ObjectStore
from storage.quarantine import is_in_quarantine, reason_of
from storage.records import read


def meant_by(store: ObjectStore, name: AdapterName, selector: str) -> tuple[AdapterVersion, ...]:
    """The version a selector names, and for an alias those it meant before, newest first.

    Raises:
        UnknownModelError: no such adapter, alias or version.
        AmbiguousModelError: several versions start like that.
    """
    record = None
    if is_name(selector):
        record = read(store, layout.alias(name, selector), AliasRecord)
    tombstone = read_tombstone(store, name)
    live = None if record is None else live_record(selector, record, tombstone)
    if live is not None:
        return versions_of(live)
    digits = selector.removeprefix(VERSION_PREFIX)
    found: list[AdapterVersion] = []
    if VERSION_START.fullmatch(digits):
        found = list_versions(store, name, tombstone, digits)
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{len(found)} versions of adapter {name.name!r} start with {digits}; give more digits",
            param="model",
        )
    if not found:
        raise no_selector(store, name, selector, tombstone)
    return tuple(found)


def first_intact(
    store: ObjectStore, name: AdapterName, versions: Sequence[AdapterVersion]
) -> AdapterVersion:
    """The first that is not in quarantine. Raises AdapterCorruptError when all are."""
    found = newest_good(versions, lambda version: not is_in_quarantine(store, version))
    if found is None:
        reason = reason_of(store, versions[0]) or "its files are damaged"
        raise AdapterCorruptError(
            f"version {versions[0][:12]} of adapter {name.name!r} is in quarantine ({reason}); publish it again"
        )
    return found


def no_selector(
    store: ObjectStore, name: AdapterName, selector: str, tombstone: Tombstone
) -> UnknownModelError:
    """What is wrong with a selector that means nothing: the adapter, or what came after its name."""
    if list_versions(store, name, tombstone):
        return UnknownModelError(
            f"the adapter {name.name!r} has no alias or version {selector!r}", param="model"
        )
    return no_adapter(name)
