"""The registry: which adapters exist, which version each alias means, and their files, in one object store.

A publish writes blobs, then the manifest, then the alias, then the index (`storage/index.py`) and its generation. The
manifest is the commit: whoever is killed earlier has published nothing, whoever is killed later has published, and
publishing again finishes the rest under the same version. Knows nothing of tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from itertools import islice

from storage import layout
from storage.adapter_records import (
    alias_taken,
    list_versions,
    no_adapter,
    no_version,
    read_aliases,
    read_manifest,
    read_tombstone,
)
from storage.deletion import bury_adapter, bury_version
from storage.errors import FloraError, InvalidRequestError
from storage.generation import bump_generation, read_generation
from storage.history import live_record, newest_good, versions_of
from storage.identity import (
    DEFAULT_ALIAS,
    AdapterName,
    AdapterVersion,
    checked_name,
    checked_version,
)
from storage.index import update_entry
from storage.index_entry import AdapterEntry
from storage.index_reader import IndexReader, IndexState
from storage.load_stages import StageClock
from storage.manifest import (
    AliasRecord,
    FileEntry,
    Manifest,
    ManifestContent,
    Pin,
    Provenance,
)
from storage.object_store import ObjectStore
from storage.quarantine import (
    is_in_quarantine,
    quarantine_if_damaged,
    read_quarantined,
)
from storage.records import read, swap
from storage.selectors import first_intact, meant_by, no_selector
from storage.version_files import entry_of, read_content, read_file
from storage.version_writer import write_version

_log = logging.getLogger(__name__)


class Registry:
    """Safe to use from any thread and any number of processes at once; keeps no state but what it read of the index.

    Every method raises `StoreUnavailableError` when the store cannot be reached, and `AdapterCorruptError` when what
    it holds is not what its digest says. Every method may be repeated after any error.

    Args:
        store: where everything is kept.
        clock: seconds since the epoch; stamps moves and deletes.
        sleep: how to wait for a garbage collection that is taking away what is being published.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._index = IndexReader(store, clock)

    # -- publishing ------------------------------------------------------------------------------

    def publish(
        self,
        name: AdapterName,
        files: Mapping[str, bytes],
        content: ManifestContent,
        *,
        provenance: Provenance,
        alias: str | None = DEFAULT_ALIAS,
        may_replace: bool = True,
        pages: int | None = None,
    ) -> AdapterVersion:
        """Make a version exist and, unless `alias` is None, let the alias mean it.

        Unless it `may_replace` others, only where the adapter has no alias yet but this one of this version.

        The same content again is the same version and keeps the provenance it was first published with; its files
        are written again, which repairs them and lifts a quarantine.

        Raises:
            ValueError: `content.files` does not describe `files`.
            InvalidRequestError: `alias` is not a valid name.
            AliasTakenError: it may not replace what the adapter has by now; the version is published all the same.
            OverloadedError: others moved the alias faster than this call could, and the version is published; or a
                garbage collection is in the way.
        """
        if content.files != {path: entry_of(data) for path, data in files.items()}:
            raise ValueError("the manifest's content does not describe the files")
        if alias is not None:
            checked_name(alias, param="alias")
        manifest = Manifest(content=content, provenance=provenance, pages=pages)
        write_version(self._store, name, files, manifest, self._clock, self._sleep)
        version = content.version
        try:
            if alias is not None and may_replace:
                self._move(name, alias, version)
            elif alias is not None:
                self._make_alias(name, alias, version)
        finally:
            self._announce(name)
        return version

    # -- reading ---------------------------------------------------------------------------------

    def resolve(self, name: AdapterName, selector: str = DEFAULT_ALIAS) -> AdapterVersion:
        """The version that a selector means now: an alias, a version, or at least 8 hex digits of its start.

        An alias wins over a version's start; `sha256:` before the digits says that a version is meant. An alias
        whose version is in quarantine means the newest version of its history that is not.

        Raises:
            UnknownModelError: no such adapter, alias or version. Does not tell which names other tenants use.
            AmbiguousModelError: several versions start like that.
            AdapterCorruptError: all that it could mean is in quarantine.
        """
        return first_intact(self._store, name, meant_by(self._store, name, selector))

    def find_version(self, name: AdapterName, selector: str) -> AdapterVersion:
        """The version a selector names, as `resolve` reads it, also one in quarantine."""
        return meant_by(self._store, name, selector)[0]

    def manifest(self, name: AdapterName, version: AdapterVersion) -> Manifest:
        """Raises UnknownModelError when the adapter has no such version, or it was deleted."""
        checked_version(version)
        if version in read_tombstone(self._store, name).versions:
            raise no_version(name, version)
        return read_manifest(self._store, name, version)

    def content(self, version: AdapterVersion) -> ManifestContent:
        """What makes up a version, whatever name it has: all a replica needs to load it. Raises UnknownModelError."""
        return read_content(self._store, version)

    def read_file(self, entry: FileEntry, stages: StageClock | None = None) -> bytes:
        """A file's bytes, never others than its digest says; a large one is read in parallel ranges.

        Args:
            stages: measures the reading and the check of the digest.

        Raises:
            AdapterCorruptError: it is missing, or damaged.
        """
        return read_file(self._store, entry, stages or StageClock())

    def versions(self, name: AdapterName) -> list[Manifest]:
        """Every version of an adapter, oldest first; empty when there is no such adapter."""
        found = [
            read_manifest(self._store, name, version)
            for version in list_versions(self._store, name, read_tombstone(self._store, name))
        ]
        return sorted(found, key=lambda manifest: manifest.provenance.created_s)

    def list(
        self,
        tenant: str | None = None,
        *,
        limit: int | None = None,
        after: AdapterName | None = None,
    ) -> Mapping[AdapterName, AdapterEntry]:
        """A page of the adapters, in order, from the index: a later call reads only what changed since.

        Args:
            tenant: whose; None for every tenant.
            limit: at most so many; None for all.
            after: only adapters that come after this one, whether or not it exists.
        """
        if tenant is not None:
            checked_name(tenant, param="tenant")
        page = (
            (name, entry)
            for name, entry in self.index().adapters.items()
            if (tenant is None or name.tenant == tenant) and (after is None or name > after)
        )
        return dict(islice(page, limit))

    def index(self) -> IndexState:
        """All adapters and what is in quarantine, from the index; the same object while nothing changes."""
        return self._index.read()

    def aliases(self, name: AdapterName) -> dict[str, AliasRecord]:
        """What each alias of an adapter means now, and meant; empty when there is no such adapter.

        A version in quarantine is named here all the same: it is what the alias should mean.
        """
        return read_aliases(self._store, name)

    def generation(self) -> int:
        """A number that has grown after every change that others can see: poll it to hear of changes."""
        return read_generation(self._store)

    # -- aliases ---------------------------------------------------------------------------------

    def move_alias(self, name: AdapterName, alias: str, version: AdapterVersion) -> AliasRecord:
        """Let an alias mean a version, old or new.

        Raises:
            UnknownModelError: the adapter has no such version.
            AdapterCorruptError: the version is in quarantine.
            InvalidRequestError: `alias` is not a valid name.
            OverloadedError: others moved the alias faster than this call could; nothing changed.
        """
        checked_name(alias, param="alias")
        self.manifest(name, version)
        first_intact(self._store, name, (version,))
        record = self._move(name, alias, version)
        self._announce(name)
        return record

    def roll_back(self, name: AdapterName, alias: str) -> AliasRecord:
        """Let an alias mean again what it meant before; a second call undoes the first.

        Deleted versions and those in quarantine are passed over. Of several callers at once each takes one step.

        Raises:
            UnknownModelError: no such adapter or alias.
            InvalidRequestError: it never meant another version that is still good.
            OverloadedError: others moved the alias faster than this call could; nothing changed.
        """
        checked_name(alias, param="alias")

        def step_back(old: AliasRecord | None) -> AliasRecord:
            tombstone = read_tombstone(self._store, name)
            live = None if old is None else live_record(alias, old, tombstone)
            if old is None or live is None:
                raise no_selector(self._store, name, alias, tombstone)
            target = newest_good(
                versions_of(live)[1:], lambda version: not is_in_quarantine(self._store, version)
            )
            if target is None:
                raise InvalidRequestError(
                    f"the alias {alias!r} of adapter {name.name!r} has no earlier version to go back to",
                    param="alias",
                )
            return old.moved(target, self._clock())

        record = swap(self._store, layout.alias(name, alias), AliasRecord, step_back)
        assert record is not None  # `step_back` returns one or raises
        self._announce(name)
        return record

    # -- deleting --------------------------------------------------------------------------------

    def delete(self, name: AdapterName) -> None:
        """Take away every version and alias the adapter has now, and its pin. Files stay until garbage collection.

        A publish that runs at the same time is either taken away whole or not at all.

        Raises:
            UnknownModelError: there is no such adapter.
        """

        # Before the delete: a pin that outlived it would come back with the next publish.
        self._store.delete(layout.pin(name))
        bury_adapter(self._store, name, self._clock)
        self._announce(name)

    def delete_version(self, name: AdapterName, version: AdapterVersion) -> None:
        """Take away one version that no alias means. An alias moved to it meanwhile goes back to what it meant before.

        Raises:
            UnknownModelError: the adapter has no such version.
            InvalidRequestError: an alias means it.
        """
        checked_version(version)
        bury_version(self._store, name, version, self._clock)
        self._announce(name)

    # -- quarantine and pins ---------------------------------------------------------------------

    def quarantine(self, version: AdapterVersion, reason: str) -> bool:
        """Keep a version from being served, under every name, until its content is published again.

        Reads its files once more: whoever found them damaged may come after they were repaired.

        Returns:
            Whether it is in quarantine now; False when its files are as their digests say.

        Raises:
            UnknownModelError: there is no such version under any name.
        """
        is_bad = quarantine_if_damaged(self._store, version, reason, self._clock())
        self._announce()
        return is_bad

    def quarantined(self) -> dict[AdapterVersion, str]:
        """Every version in quarantine, and why."""
        return read_quarantined(self._store)

    def pin(self, name: AdapterName, copies: int = 1) -> None:
        """Ask for the adapter on at least so many replicas, whether or not anybody uses it.

        Raises:
            UnknownModelError: there is no such adapter.
            InvalidRequestError: `copies` is not at least 1.
        """
        if copies < 1:
            raise InvalidRequestError("an adapter is pinned to 1 replica or more", param="copies")
        if not list_versions(self._store, name, read_tombstone(self._store, name)):
            raise no_adapter(name)
        swap(self._store, layout.pin(name), Pin, lambda _: Pin(copies=copies))
        self._announce(name)

    def unpin(self, name: AdapterName) -> None:
        """Take a pin away; no error when there is none."""
        self._store.delete(layout.pin(name))
        self._announce(name)

    def pinned_copies(self, name: AdapterName) -> int:
        """On how many replicas the adapter is pinned; 0 when it is not."""
        found = read(self._store, layout.pin(name), Pin)
        return 0 if found is None else found.copies

    # -- steps -----------------------------------------------------------------------------------

    def _make_alias(self, name: AdapterName, alias: str, version: AdapterVersion) -> None:
        meant = {each: record.version for each, record in self.aliases(name).items()}
        if meant.items() - {(alias, version)}:
            raise alias_taken(name, alias, version)
        self._move(name, alias, version, may_replace=False)

    def _move(
        self, name: AdapterName, alias: str, version: AdapterVersion, *, may_replace: bool = True
    ) -> AliasRecord:
        def point(old: AliasRecord | None) -> AliasRecord | None:
            if old is None:
                return AliasRecord(version=version, generation=1, moved_s=self._clock())
            live = live_record(alias, old, read_tombstone(self._store, name))
            if not may_replace and live is not None and live.version != version:
                raise alias_taken(name, alias, version)
            is_live = live is not None and live.generation == old.generation
            if is_live and old.version == version:
                return None
            return old.moved(version, self._clock())

        record = swap(self._store, layout.alias(name, alias), AliasRecord, point)
        assert record is not None  # `point` makes one when there is none
        return record

    def _announce(self, name: AdapterName | None = None) -> None:
        """Tell readers, of one adapter's change or, with None, of a quarantine. The change itself is done already, so
        what fails here is told to nobody but the log: readers find the change when they next compare.
        """
        try:
            if name is not None:
                update_entry(self._store, name)
            bump_generation(self._store)
        except FloraError as error:
            _log.warning("the index is behind: %s", error.message)
