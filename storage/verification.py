"""Whether the registry's bytes are what their digests say; puts what is not into quarantine, and the index right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from storage import layout
from storage.adapter_records import list_versions, no_adapter, read_manifest, read_tombstone
from storage.errors import AdapterCorruptError, UnknownModelError
from storage.generation import bump_generation
from storage.identity import AdapterName, AdapterVersion
from storage.index import parallel, reconcile
from storage.manifest import FileEntry, Manifest, Provenance
from storage.object_store import ObjectNotFoundError, ObjectStore
from storage.records import encode
from storage.registry import Registry

_CHUNK_BYTES = 8 << 20
_FILES_AT_ONCE = 8

OfAdapter = tuple[AdapterName, AdapterVersion]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it should be; `version` is known by `names`."""

    version: AdapterVersion
    names: tuple[AdapterName, ...]
    what: str
    is_quarantined: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at and found."""

    versions: int = 0
    files: int = 0
    num_bytes: int = 0
    damaged: tuple[Damage, ...] = ()
    repaired: tuple[OfAdapter, ...] = ()  # manifests written again
    lifted: tuple[AdapterVersion, ...] = ()  # out of quarantine: their files are whole
    reindexed: tuple[AdapterName, ...] = ()  # entries of the index that were wrong


def verify(
    registry: Registry,
    store: ObjectStore,
    name: AdapterName | None = None,
    *,
    repair: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Read every byte of an adapter's versions, or with None of all there are.

    Versions with damaged files go into quarantine; those in quarantine whose files are whole come out.

    Args:
        store: the registry's.
        repair: also write damaged manifests again, with what is left of them, and make the index anew.
        report: told now and then what is being done.

    Raises:
        UnknownModelError: there is no adapter of that name.
    """
    report("listing versions")
    of_adapters = _versions(store, name)
    by_version: dict[AdapterVersion, list[AdapterName]] = {}
    for owner, version in of_adapters:
        by_version.setdefault(version, []).append(owner)
    problems: dict[AdapterVersion, str] = {}
    files_of: dict[AdapterVersion, tuple[FileEntry, ...]] = {}
    for version, found in zip(
        by_version, parallel(lambda each: _content(registry, each), by_version), strict=True
    ):
        if isinstance(found, str):
            problems[version] = found
        else:
            files_of[version] = found
    files = {entry.sha256: entry for entries in files_of.values() for entry in entries}
    bad_files = _bad_files(store, files, report)
    for version, entries in files_of.items():
        bad = [bad_files[entry.sha256] for entry in entries if entry.sha256 in bad_files]
        if bad:
            problems[version] = "; ".join(bad)

    damaged = []
    for version, what in sorted(problems.items()):
        with suppress(UnknownModelError):  # collected meanwhile
            is_bad = registry.quarantine(version, what)
            damaged.append(Damage(version, tuple(by_version[version]), what, is_bad))
    lifted = []
    for version, reason in registry.quarantined().items():
        if version in files_of and version not in problems:
            with suppress(UnknownModelError):
                if not registry.quarantine(version, reason):
                    lifted.append(version)
    bad_manifests = _bad_manifests(store, of_adapters)
    repaired = []
    for (owner, version), what in bad_manifests.items():
        if repair and version not in problems:
            _repair_manifest(registry, store, owner, version)
            repaired.append((owner, version))
        else:
            damaged.append(Damage(version, (owner,), what, is_quarantined=False))
    report("comparing the index")
    reindexed = reconcile(store, anew=repair)
    if reindexed:
        bump_generation(store)
    return Verification(
        versions=len(by_version),
        files=len(files),
        num_bytes=sum(entry.num_bytes for entry in files.values()),
        damaged=tuple(damaged),
        repaired=tuple(repaired),
        lifted=tuple(lifted),
        reindexed=tuple(reindexed),
    )


def _versions(store: ObjectStore, name: AdapterName | None) -> list[OfAdapter]:
    if name is not None:
        versions = list_versions(store, name, read_tombstone(store, name))
        if not versions:
            raise no_adapter(name)
        return [(name, version) for version in versions]
    found, buried = [], []
    for each in store.list(layout.ADAPTERS):
        manifest, tombstone = layout.parse_manifest(each.key), layout.parse_tombstone(each.key)
        if manifest is not None:
            found.append(manifest)
        elif tombstone is not None:
            buried.append(tombstone)
    read = parallel(lambda owner: read_tombstone(store, owner).versions, buried)
    gone = dict(zip(buried, read, strict=True))
    return [(owner, version) for owner, version in found if version not in gone.get(owner, ())]


def _content(registry: Registry, version: AdapterVersion) -> tuple[FileEntry, ...] | str:
    """Its files, or why they are not known."""
    try:
        return tuple(registry.content(version).files.values())
    except AdapterCorruptError as error:
        return error.message
    except UnknownModelError:
        return f"the stored description of version {version} is missing"


def _bad_files(
    store: ObjectStore, files: Mapping[str, FileEntry], report: Callable[[str], None]
) -> dict[str, str]:
    """What is wrong with each file that is not whole."""
    bad = {}
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        found = threads.map(lambda entry: _problem(store, entry), files.values())
        for number, (digest, problem) in enumerate(zip(files, found, strict=True)):
            if problem is not None:
                bad[digest] = problem
            if number % 50 == 0:
                report(f"reading files: {number} of {len(files)}")
    return bad


def _problem(store: ObjectStore, entry: FileEntry) -> str | None:
    key, digest = layout.blob(entry.sha256), hashlib.sha256()
    try:
        # One byte more than there should be, to see when a file is too long.
        for start in range(0, entry.num_bytes + 1, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, entry.num_bytes + 1)
            digest.update(store.get_range(key, start, stop))
    except ObjectNotFoundError:
        return f"the stored file {entry.sha256[:12]} is missing"
    is_whole = digest.hexdigest() == entry.sha256
    return None if is_whole else f"the stored file {entry.sha256[:12]} is damaged"


def _bad_manifests(store: ObjectStore, versions: list[OfAdapter]) -> dict[OfAdapter, str]:
    def problem(of_adapter: OfAdapter) -> str | None:
        try:
            read_manifest(store, *of_adapter)
        except AdapterCorruptError as error:
            return error.message
        except UnknownModelError:  # deleted meanwhile
            return None
        return None

    found = zip(versions, parallel(problem, versions), strict=True)
    return {each: what for each, what in found if what is not None}


def _repair_manifest(
    registry: Registry, store: ObjectStore, name: AdapterName, version: AdapterVersion
) -> None:
    """The content is stored by its digest as well; where it came from is lost."""
    (listed,) = store.list(layout.manifest(name, version))
    provenance = Provenance(
        created_s=listed.modified_s, warnings=("where this version came from was lost",)
    )
    manifest = Manifest(content=registry.content(version), provenance=provenance)
    store.put(listed.key, encode(manifest))
