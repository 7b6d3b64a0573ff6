"""What deleting does to the records: one write of an adapter's tombstone, decided from what is there at that moment."""

from __future__ import annotations

from collections.abc import Callable

from storage import layout
from storage.adapter_records import (
    NOTHING_DELETED,
    list_versions,
    no_adapter,
    no_version,
    read_alias_records,
    read_aliases,
)
from storage.errors import InvalidRequestError
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import Tombstone
from storage.object_store import ObjectStore
from storage.records import swap


def bury_adapter(store: ObjectStore, name: AdapterName, clock: Callable[[], float]) -> None:
    """Take away every version and alias the adapter has now.

    A publish that runs at the same time is either taken away whole or not at all.

    Raises:
        UnknownModelError: there is no such adapter.
    """

    def bury(old: Tombstone | None) -> Tombstone:
        buried = old or NOTHING_DELETED
        # Aliases first: a version whose alias is seen here is then seen too.
        records = read_alias_records(store, name)
        aliases = {alias: found.generation for alias, found in records.items()}
        versions = list_versions(store, name, buried)
        if not versions:
            raise no_adapter(name)
        return buried.with_deleted(versions, aliases, clock())

    swap(store, layout.tombstone(name), Tombstone, bury)


def bury_version(
    store: ObjectStore, name: AdapterName, version: AdapterVersion, clock: Callable[[], float]
) -> None:
    """Take away one version that no alias means. An alias moved to it meanwhile goes back to what it meant before.

    Raises:
        UnknownModelError: the adapter has no such version.
        InvalidRequestError: an alias means it.
    """

    def bury(old: Tombstone | None) -> Tombstone:
        buried = old or NOTHING_DELETED
        meant_by = sorted(
            alias
            for alias, record in read_aliases(store, name).items()
            if record.version == version
        )
        if meant_by:
            raise InvalidRequestError(
                f"the alias {', '.join(meant_by)} of adapter {name.name!r} means version {version[:12]}; "
                "move it first",
                param="version",
            )
        if version not in list_versions(store, name, buried, version):
            raise no_version(name, version)
        return buried.with_deleted((version,), {}, clock())

    swap(store, layout.tombstone(name), Tombstone, bury)
