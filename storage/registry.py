"""The registry: which adapters exist, which version each alias means, and their files, in one object store.

A publish writes blobs, then the manifest, then the alias, then `index/generation`. The manifest is the commit: whoever
is killed earlier has published nothing, whoever is killed later has published, and publishing again finishes the rest
under the same version. Knows nothing of tensors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

from storage import layout
from storage.errors import (
    AdapterCorruptError,
    AmbiguousModelError,
    UnknownModelError,
)
from storage.identity import (
    DEFAULT_ALIAS,
    VERSION_PREFIX,
    AdapterName,
    AdapterVersion,
    canonical_json,
    checked_name,
    checked_version,
    is_name,
    sha256_hex,
)
from storage.manifest import (
    AliasRecord,
    FileEntry,
    Manifest,
    ManifestContent,
    Provenance,
    Tombstone,
)
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError
from storage.records import decode, encode, read, swap

_VERSION_START = re.compile(r"[0-9a-f]{8,64}")
_NOTHING_DELETED = Tombstone(deleted_s=0.0)


class Registry:
    """Safe to use from any thread and any number of processes at once; keeps no state of its own.

    Every method raises `StoreUnavailableError` when the store cannot be reached, and `AdapterCorruptError` when what
    it holds is not what its digest says. Every method may be repeated after any error.

    Args:
        store: where everything is kept.
        clock: seconds since the epoch; stamps deletes.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def publish(
        self,
        name: AdapterName,
        files: Mapping[str, bytes],
        content: ManifestContent,
        *,
        provenance: Provenance,
        alias: str | None = DEFAULT_ALIAS,
    ) -> AdapterVersion:
        """Make a version exist and, unless `alias` is None, let the alias mean it.

        The same content again is the same version and keeps the provenance it was first published with.

        Raises:
            ValueError: `content.files` does not describe `files`.
            InvalidRequestError: `alias` is not a valid name.
            OverloadedError: others moved the alias faster than this call could; the version is published.
        """
        if content.files != {path: _entry(data) for path, data in files.items()}:
            raise ValueError("the manifest's content does not describe the files")
        if alias is not None:
            checked_name(alias, param="alias")
        version = content.version
        # Blobs are written even if they exist: their new time keeps garbage collection away from them.
        for data in files.values():
            self._store.put(layout.blob(sha256_hex(data)), data)
        self._store.put(layout.blob(version), canonical_json(content.model_dump(mode="json")))
        try:
            self._store.put_if_absent(
                layout.manifest(name, version),
                encode(Manifest(content=content, provenance=provenance)),
            )
        except PreconditionFailedError:
            self._read_manifest(name, version)
        self._revive(name, version)
        if alias is not None:
            self._move(name, alias, version)
        self._bump_generation()
        return version

    def resolve(self, name: AdapterName, selector: str = DEFAULT_ALIAS) -> AdapterVersion:
        """The version that a selector means now: an alias, a version, or at least 8 hex digits of its start.

        An alias wins over a version's start; `sha256:` before the digits says that a version is meant.

        Raises:
            UnknownModelError: no such adapter, alias or version. Does not tell which names other tenants use.
            AmbiguousModelError: several versions start like that.
        """
        tombstone = self._tombstone(name)
        if is_name(selector):
            record = read(self._store, layout.alias(name, selector), AliasRecord)
            if record is not None and _is_live(selector, record, tombstone):
                return AdapterVersion(record.version)
        digits = selector.removeprefix(VERSION_PREFIX)
        found: list[AdapterVersion] = []
        if _VERSION_START.fullmatch(digits):
            found = self._live_versions(name, tombstone, digits)
        if len(found) > 1:
            raise AmbiguousModelError(
                f"{len(found)} versions of adapter {name.name!r} start with {digits}; give more digits",
                param="model",
            )
        if not found:
            raise self._unknown(name, selector, tombstone)
        return found[0]

    def manifest(self, name: AdapterName, version: AdapterVersion) -> Manifest:
        """Raises UnknownModelError when the adapter has no such version, or it was deleted."""
        checked_version(version)
        if version in self._tombstone(name).versions:
            raise _no_version(name, version)
        return self._read_manifest(name, version)

    def content(self, version: AdapterVersion) -> ManifestContent:
        """What makes up a version, whatever name it has: all a replica needs to load it. Raises UnknownModelError."""
        try:
            data = self._store.get(layout.blob(checked_version(version))).data
        except ObjectNotFoundError:
            raise UnknownModelError(
                f"the adapter version {version} does not exist", param="model"
            ) from None
        if sha256_hex(data) != version:
            raise AdapterCorruptError(f"the stored description of version {version} is damaged")
        return decode(data, ManifestContent, f"version {version}")

    def read_file(self, entry: FileEntry) -> bytes:
        """A file's bytes, never others than its digest says. Raises AdapterCorruptError."""
        try:
            data = self._store.get(layout.blob(entry.sha256)).data
        except ObjectNotFoundError:
            raise AdapterCorruptError(f"the stored file {entry.sha256} is missing") from None
        if _entry(data) != entry:
            raise AdapterCorruptError(f"the stored file {entry.sha256} is damaged")
        return data

    def names(self, tenant: str | None = None) -> list[AdapterName]:
        """Every adapter that has a version, in order; of all tenants when `tenant` is None."""
        if tenant is not None:
            checked_name(tenant, param="tenant")
        versions: dict[AdapterName, set[str]] = {}
        buried: set[AdapterName] = set()
        for found in self._store.list(layout.tenant_folder(tenant)):
            if (manifest := layout.parse_manifest(found.key)) is not None:
                versions.setdefault(manifest[0], set()).add(manifest[1])
            elif (name := layout.parse_tombstone(found.key)) is not None:
                buried.add(name)
        return sorted(
            name
            for name, known in versions.items()
            if name not in buried or known.difference(self._tombstone(name).versions)
        )

    def versions(self, name: AdapterName) -> list[Manifest]:
        """Every version of an adapter, oldest first; empty when there is no such adapter."""
        found = [
            self._read_manifest(name, version)
            for version in self._live_versions(name, self._tombstone(name))
        ]
        return sorted(found, key=lambda manifest: manifest.provenance.created_s)

    def aliases(self, name: AdapterName) -> dict[str, AliasRecord]:
        """What each alias of an adapter means now; empty when there is no such adapter."""
        tombstone = self._tombstone(name)
        return {
            alias: record
            for alias, record in self._alias_records(name).items()
            if _is_live(alias, record, tombstone)
        }

    def move_alias(self, name: AdapterName, alias: str, version: AdapterVersion) -> AliasRecord:
        """Let an alias mean a version, old or new; rolling back is moving it to an older one.

        Raises:
            UnknownModelError: the adapter has no such version.
            InvalidRequestError: `alias` is not a valid name.
            OverloadedError: others moved the alias faster than this call could; nothing changed.
        """
        checked_name(alias, param="alias")
        self.manifest(name, version)
        record = self._move(name, alias, version)
        self._bump_generation()
        return record

    def delete(self, name: AdapterName) -> None:
        """Take away every version and alias the adapter has now. Its files stay until garbage collection.

        A publish that runs at the same time is either taken away whole or not at all.

        Raises:
            UnknownModelError: there is no such adapter.
        """

        def bury(old: Tombstone | None) -> Tombstone:
            buried = old or _NOTHING_DELETED
            # Aliases first: a version whose alias is seen here is then seen too.
            aliases = {
                alias: found.generation for alias, found in self._alias_records(name).items()
            }
            versions = self._live_versions(name, buried)
            if not versions:
                raise UnknownModelError(f"the adapter {name.name!r} does not exist", param="model")
            return Tombstone(
                versions=tuple(sorted({*buried.versions, *versions})),
                aliases=buried.aliases | aliases,
                deleted_s=self._clock(),
            )

        swap(self._store, layout.tombstone(name), Tombstone, bury)
        self._bump_generation()

    def generation(self) -> int:
        """A number that has grown after every publish, alias move and delete: poll it to hear of changes."""
        try:
            return _number(self._store.get(layout.GENERATION).data)
        except ObjectNotFoundError:
            return 0

    def _move(self, name: AdapterName, alias: str, version: AdapterVersion) -> AliasRecord:
        def point(old: AliasRecord | None) -> AliasRecord | None:
            if old is None:
                return AliasRecord(version=version, generation=1)
            if old.version == version and _is_live(alias, old, self._tombstone(name)):
                return None
            return AliasRecord(version=version, generation=old.generation + 1)

        record = swap(self._store, layout.alias(name, alias), AliasRecord, point)
        assert record is not None  # `point` makes one when there is none
        return record

    def _revive(self, name: AdapterName, version: AdapterVersion) -> None:
        def unbury(old: Tombstone | None) -> Tombstone | None:
            if old is None or version not in old.versions:
                return None
            kept = tuple(other for other in old.versions if other != version)
            return old.model_copy(update={"versions": kept})

        swap(self._store, layout.tombstone(name), Tombstone, unbury)

    def _bump_generation(self) -> None:
        """A lost race needs no second try: whoever won it wrote after our change, and so announces it as well."""
        try:
            current = self._store.get(layout.GENERATION)
        except ObjectNotFoundError:
            current = None
        try:
            if current is None:
                self._store.put_if_absent(layout.GENERATION, b"1")
            else:
                number = _number(current.data) + 1
                self._store.compare_and_swap(layout.GENERATION, b"%d" % number, current.etag)
        except PreconditionFailedError:
            pass

    def _live_versions(
        self, name: AdapterName, tombstone: Tombstone, start: str = ""
    ) -> list[AdapterVersion]:
        found = []
        for entry in self._store.list(layout.versions_folder(name) + start):
            parsed = layout.parse_manifest(entry.key)
            if parsed is not None and parsed[1] not in tombstone.versions:
                found.append(parsed[1])
        return found

    def _alias_records(self, name: AdapterName) -> dict[str, AliasRecord]:
        records = {}
        for entry in self._store.list(layout.aliases_folder(name)):
            alias = layout.parse_alias(entry.key)
            record = None if alias is None else read(self._store, entry.key, AliasRecord)
            if alias is not None and record is not None:
                records[alias] = record
        return records

    def _read_manifest(self, name: AdapterName, version: AdapterVersion) -> Manifest:
        manifest = read(self._store, layout.manifest(name, version), Manifest)
        if manifest is None:
            raise _no_version(name, version)
        if manifest.version != version:
            raise AdapterCorruptError(
                f"the manifest of adapter {name.name!r} version {version} is damaged"
            )
        return manifest

    def _tombstone(self, name: AdapterName) -> Tombstone:
        return read(self._store, layout.tombstone(name), Tombstone) or _NOTHING_DELETED

    def _unknown(self, name: AdapterName, selector: str, tombstone: Tombstone) -> UnknownModelError:
        if self._live_versions(name, tombstone):
            return UnknownModelError(
                f"the adapter {name.name!r} has no alias or version {selector!r}", param="model"
            )
        return UnknownModelError(f"the adapter {name.name!r} does not exist", param="model")


def _entry(data: bytes) -> FileEntry:
    return FileEntry(sha256=sha256_hex(data), num_bytes=len(data))


def _number(data: bytes) -> int:
    try:
        return int(data)
    except ValueError:
        raise AdapterCorruptError("the registry's index/generation is not a number") from None


def _is_live(alias: str, record: AliasRecord, tombstone: Tombstone) -> bool:
    return (
        record.generation > tombstone.aliases.get(alias, 0)
        and record.version not in tombstone.versions
    )


def _no_version(name: AdapterName, version: AdapterVersion) -> UnknownModelError:
    return UnknownModelError(f"the adapter {name.name!r} has no version {version}", param="model")
