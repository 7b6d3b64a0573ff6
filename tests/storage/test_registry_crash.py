"""A publisher that is killed, at any step, leaves the old state or the new one; publishing again finishes the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage import layout
from storage.config import StorageSettings
from storage.errors import UnknownModelError
from storage.identity import sha256_hex
from storage.index import reconcile
from storage.index_reader import COMPARE_S, IndexReader
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store
from storage.sweep import LEASE_S
from tests.storage import dying_process
from tests.storage.versions import NAME, assert_whole, content_of, files_of, publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")
_REPOSITORY = Path(__file__).parents[2]
_WRITES = ["config", "tensors", "content", "manifest", "alias", "index", "generation"]


def _registries(settings: StorageSettings, num_writes: int) -> list[StorageSettings]:
    """One registry per step that may be the last one, and one where none is."""
    return [
        settings.model_copy(update={"registry": f"{settings.registry}/{number}"})
        for number in range(num_writes + 1)
    ]


def _do_dying(what: str, registries: list[StorageSettings]) -> list[int]:
    arguments = [registry.model_dump_json() for registry in registries]
    output = subprocess.run(
        [sys.executable, "-m", "tests.storage.dying_process", what, *arguments],
        cwd=_REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return [int(line) for line in output.split()]


@pytest.mark.parametrize(
    ("kind", "is_first"),
    [("local", True), ("local", False), ("s3", False)],
    ids=["local-first-version", "local-next-version", "s3-next-version"],
)
def test_publish_survives_a_kill_before_every_write(
    request: pytest.FixtureRequest, kind: str, is_first: bool
) -> None:
    registries = _registries(request.getfixturevalue(f"{kind}_settings"), len(_WRITES))
    stores = [open_store(registry) for registry in registries]
    opened = [Registry(store) for store in stores]
    if not is_first:
        for registry in opened:
            publish(registry, "old")
    statuses = _do_dying("publish:new", registries)
    assert statuses == [-signal.SIGKILL] * len(_WRITES) + [0]

    old, new = version_of("old"), version_of("new")
    for num_written, registry in enumerate(opened):
        is_committed = num_written > _WRITES.index("manifest")
        is_moved = num_written > _WRITES.index("alias")
        versions = {manifest.version for manifest in registry.versions(NAME)}
        assert versions == {*([] if is_first else [old]), *([new] if is_committed else [])}
        for version in versions:
            assert_whole(registry, NAME, version)
        if is_moved:
            assert registry.resolve(NAME) == new
        elif is_first:
            with pytest.raises(UnknownModelError):
                registry.resolve(NAME)
        else:
            assert registry.resolve(NAME) == old

        assert_listed(stores[num_written], registry)

        before = registry.generation()
        assert publish(registry, "new") == new
        assert registry.resolve(NAME) == new
        assert registry.generation() > before
        assert registry.aliases(NAME)["latest"].generation == (1 if is_first else 2)
        assert_whole(registry, NAME, new)


def assert_listed(store: ObjectStore, registry: Registry) -> None:
    """What nobody announced is in the index after the next comparison."""
    found = IndexReader(store, lambda: time.time() + COMPARE_S).read().adapters.get(NAME)
    listed = () if found is None else found.versions
    assert {each.version for each in listed} == {each.version for each in registry.versions(NAME)}
    meant = {} if found is None else found.aliases
    assert {alias: each.version for alias, each in meant.items()} == {
        alias: each.version for alias, each in registry.aliases(NAME).items()
    }
    assert reconcile(store, anew=True) == []


def test_a_collection_survives_a_kill_before_every_write(local_settings: StorageSettings) -> None:
    """Nothing that is named goes, at whatever step it was killed, and the next one takes what it left."""
    registries = _registries(local_settings, 18)
    stores = [open_store(registry) for registry in registries]
    for store in stores:
        registry = Registry(store)
        publish(registry, "stays")
        registry.delete_version(NAME, publish(registry, "goes", alias=None))
        store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    statuses = _do_dying("collect", registries)
    num_kills = statuses.count(-signal.SIGKILL)
    assert statuses == [-signal.SIGKILL] * num_kills + [0] * (len(statuses) - num_kills)
    assert 8 <= num_kills < 18, "every write was the last one once"
    stays = {version_of("stays"), *(sha256_hex(data) for data in files_of("stays").values())}
    for store in stores:
        registry = Registry(store)
        assert_whole(registry, NAME, version_of("stays"))
        assert registry.resolve(NAME) == version_of("stays")
        assert [each.version for each in registry.versions(NAME)] == [version_of("stays")]
        assert_listed(store, registry)
        dying_process.collect_after_the_lease(store)
        assert {each.key.removeprefix(layout.BLOBS) for each in store.list(layout.BLOBS)} == stays
        assert_whole(registry, NAME, version_of("stays"))
        # Whoever publishes what was being collected waits no longer than the dead collector's lease.
        late = Registry(store, lambda: time.time() + 2 * LEASE_S)
        assert publish(late, "goes") == registry.resolve(NAME)
        assert_whole(registry, NAME, version_of("goes"))


def test_a_half_written_file_is_repaired_by_the_retry(settings: StorageSettings) -> None:
    """A kill may leave a blob that nobody wrote whole, on a store with weaker promises than ours."""
    store = open_store(settings)
    registry = Registry(store)
    content = content_of(files_of("new"))
    store.put(f"blobs/sha256/{content.files['adapter_model.safetensors'].sha256}", b"ne")
    assert_whole(registry, NAME, publish(registry, "new"))
