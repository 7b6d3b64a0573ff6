"""Garbage collection: deleted versions, and files that no version names, some time after they became that.

Deletes only what is older than the grace period and was looked at twice; `storage/sweep.py` keeps publishers safe in
between. May be killed at any point: what is left is found by the next one. Aliases and tombstones stay, a few hundred
bytes for each deleted adapter, so that an alias's generation never goes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from storage import layout
from storage.adapter_records import read_alias_records, read_tombstone
from storage.errors import AdapterCorruptError, InvalidRequestError, UnknownModelError
from storage.generation import bump_generation
from storage.identity import AdapterName, AdapterVersion
from storage.index import parallel, update_entry
from storage.manifest import ManifestContent, Tombstone
from storage.object_store import ObjectInfo, ObjectStore
from storage.records import swap
from storage.registry import Registry
from storage.sweep import sweep

DEFAULT_GRACE_S = 24 * 3600.0
_SWEPT_AT_ONCE = 500

OfAdapter = tuple[AdapterName, AdapterVersion]


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may go, or what went. `versions` were deleted; `blobs` are named by no version."""

    versions: tuple[OfAdapter, ...] = ()
    blobs: tuple[str, ...] = ()
    num_bytes: int = 0  # of the blobs


class Collector:
    """Of one registry. Any number may be started; one sweeps at a time.

    Args:
        store: the registry's.
        grace_s: how long something must have been garbage. Longer than any publish takes, and than clocks differ.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        registry: Registry,
        store: ObjectStore,
        *,
        grace_s: float = DEFAULT_GRACE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._store = store
        self._grace_s = grace_s
        self._clock = clock
        self._contents: dict[
            OfAdapter, frozenset[str]
        ] = {}  # the blobs each version names, as read

    def old_versions(self, keep: int) -> list[OfAdapter]:
        """Versions that no alias means or meant as far as it remembers, without the `keep` newest of each adapter."""
        if keep < 0:
            raise InvalidRequestError("a number of versions is 0 or more", param="keep_versions")
        found = []
        for name, entry in self._registry.index().adapters.items():
            meant = {
                version
                for alias in entry.aliases.values()
                for version in (alias.version, *alias.earlier)
            }
            versions = [summary.version for summary in entry.versions]
            old = versions[: max(0, len(versions) - keep)]
            found += [(name, version) for version in old if version not in meant]
        return found

    def delete_old_versions(self, keep: int) -> list[OfAdapter]:
        """Delete what `old_versions` finds; its files go after the grace period. Returns what was deleted."""

        def delete(old: OfAdapter) -> bool:
            with suppress(
                InvalidRequestError, UnknownModelError
            ):  # an alias means it since, or it is gone
                self._registry.delete_version(*old)
                return True
            return False

        old = self.old_versions(keep)
        return [each for each, is_gone in zip(old, parallel(delete, old), strict=True) if is_gone]

    def find(self) -> Garbage:
        """What `collect` would take away now; changes nothing.

        Raises:
            AdapterCorruptError: a version cannot be read, so what it names is unknown; says which.
        """
        listed = self._versions()
        expired = self._expired(listed)
        named = self._named(set(listed).difference(expired))
        blobs = self._old_blobs()
        unnamed = [info for digest, info in blobs.items() if digest not in named]
        return Garbage(
            tuple(sorted(expired)),
            tuple(info.key for info in unnamed),
            sum(info.num_bytes for info in unnamed),
        )

    def collect(self) -> Garbage:
        """Take away what is garbage; returns what went.

        Raises:
            AdapterCorruptError: as `find`, before any file is deleted.
            OverloadedError: another collection is running.
        """
        expired = {layout.manifest(*each): each for each in self._expired(self._versions())}
        gone = self._sweep(expired.keys(), lambda keys: self._still_expired(expired, keys))
        names = {expired[key][0] for key in gone}
        parallel(self._tidy, sorted(names))
        if names:
            bump_generation(self._store)
        garbage = self.find()
        sizes = {info.key: info.num_bytes for info in self._old_blobs().values()}
        blobs = self._sweep(garbage.blobs, self._still_unnamed)
        self._remove_probes()
        return replace(
            garbage,
            versions=tuple(sorted(expired[key] for key in gone)),
            blobs=tuple(blobs),
            num_bytes=sum(sizes.get(key, 0) for key in blobs),
        )

    # -- deleted versions ------------------------------------------------------------------------

    def _versions(self) -> list[OfAdapter]:
        """Every version that has a manifest, deleted or not."""
        parsed = (layout.parse_manifest(each.key) for each in self._store.list(layout.ADAPTERS))
        return [each for each in parsed if each is not None]

    def _expired(self, versions: Collection[OfAdapter]) -> set[OfAdapter]:
        """Those that were deleted longer ago than the grace period."""
        names = {
            name
            for each in self._store.list(layout.ADAPTERS)
            if (name := layout.parse_tombstone(each.key)) is not None
        }
        with_versions = sorted(names.intersection(name for name, _ in versions))
        read = parallel(lambda name: read_tombstone(self._store, name), with_versions)
        tombstones = dict(zip(with_versions, read, strict=True))
        return {
            (name, version)
            for name, version in versions
            if name in tombstones and self._is_expired(tombstones[name], version)
        }

    def _is_expired(self, tombstone: Tombstone, version: AdapterVersion) -> bool:
        is_old = tombstone.deleted_at(version) <= self._clock() - self._grace_s
        return version in tombstone.versions and is_old

    def _still_expired(
        self, expired: Mapping[str, OfAdapter], keys: Collection[str]
    ) -> Collection[str]:
        found = self._expired([expired[key] for key in keys])
        return [key for key in keys if expired[key] in found]

    def _tidy(self, name: AdapterName) -> None:
        """Forget deleted versions whose manifests are gone, but those that an alias could go back to."""

        def forget(tombstone: Tombstone | None) -> Tombstone | None:
            if tombstone is None:
                return None
            remembered = {
                move.version
                for alias, record in read_alias_records(self._store, name).items()
                for move in record.moves
                if move.generation > tombstone.aliases.get(alias, 0)
            }
            kept = tombstone
            for version in set(tombstone.versions) - remembered:
                if not self._store.exists(layout.manifest(name, AdapterVersion(version))):
                    kept = kept.without(version)
            return None if kept == tombstone else kept

        swap(self._store, layout.tombstone(name), Tombstone, forget)
        update_entry(self._store, name)

    # -- files -----------------------------------------------------------------------------------

    def _old_blobs(self) -> dict[str, ObjectInfo]:
        """Blobs by digest that nobody wrote during the grace period."""
        newest_s = self._clock() - self._grace_s
        return {
            digest: each
            for each in self._store.list(layout.BLOBS)
            if (digest := layout.parse_blob(each.key)) is not None and each.modified_s <= newest_s
        }

    def _named(self, versions: Collection[OfAdapter]) -> set[str]:
        """The digests that versions name, their own included. Read once for each: a version never changes."""
        new = [each for each in versions if each not in self._contents]
        for each, content in zip(new, parallel(self._content, new), strict=True):
            digests = {entry.sha256 for entry in content.files.values()}
            self._contents[each] = frozenset({each[1], *digests})
        return {digest for each in versions for digest in self._contents[each]}

    def _content(self, version: OfAdapter) -> ManifestContent:
        try:
            return self._registry.content(version[1])
        except (AdapterCorruptError, UnknownModelError) as error:
            raise AdapterCorruptError(
                f"version {version[1][:12]} of adapter {version[0]} cannot be read, so what it needs is unknown and no "
                "file is collected; publish it again, or delete it"
            ) from error

    def _still_unnamed(self, keys: Collection[str]) -> Collection[str]:
        old = self._old_blobs()
        named = self._named(self._versions())
        digests = (key.removeprefix(layout.BLOBS) for key in keys)
        return [layout.blob(each) for each in digests if each in old and each not in named]

    # -- steps -----------------------------------------------------------------------------------

    def _sweep(
        self, keys: Collection[str], still: Callable[[Collection[str]], Collection[str]]
    ) -> list[str]:
        waiting, gone = sorted(keys), []
        while waiting:
            batch, waiting = waiting[:_SWEPT_AT_ONCE], waiting[_SWEPT_AT_ONCE:]
            gone += sweep(self._store, batch, still, self._clock)
        return gone

    def _remove_probes(self) -> None:
        """What a start-up probe left that was killed."""
        newest_s = self._clock() - self._grace_s
        probes = [
            each.key
            for each in self._store.list(layout.PROBES)
            if layout.is_probe(each.key) and each.modified_s <= newest_s
        ]
        parallel(self._store.delete, probes)
