"""Garbage collection takes what nobody can reach, after the grace period, and nothing else, whatever happens."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import boto3
import pytest

from storage import layout
from storage.collection import Collector
from storage.config import StorageSettings
from storage.errors import AdapterCorruptError, InvalidRequestError, OverloadedError
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore
from storage.records import encode
from storage.registry import Registry
from storage.stores import open_store
from storage.sweep import LEASE_S, Sweep
from tests.storage.passing_store import InterruptingStore
from tests.storage.versions import NAME, assert_whole, files_of, publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")

OTHER = AdapterName("team", "other")


class LateClock:
    """The time, some way ahead, so that everything here is old; waiting takes none."""

    def __init__(self) -> None:
        self._ahead_s = 10.0

    def __call__(self) -> float:
        return time.time() + self._ahead_s

    def sleep(self, seconds: float) -> None:
        self._ahead_s += max(seconds, LEASE_S / 4)


def collector(store: ObjectStore, clock: Callable[[], float], grace_s: float = 0.0) -> Collector:
    return Collector(Registry(store, clock), store, grace_s=grace_s, clock=clock)


def blobs_in(store: ObjectStore) -> set[str]:
    return {each.key.removeprefix(layout.BLOBS) for each in store.list(layout.BLOBS)}


def blobs_of(*texts: str) -> set[str]:
    files = {sha256_hex(data) for text in texts for data in files_of(text).values()}
    return files | {version_of(text) for text in texts}


@pytest.mark.parametrize("stray", ["blobs/sha256/", "blobs/sha256/old copy", "probes/old copy"])
def test_objects_put_there_by_hand_stay_and_hold_up_nothing(
    s3_settings: StorageSettings, stray: str
) -> None:
    """A folder marker of a bucket browser, say."""
    bucket, _, prefix = s3_settings.registry.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=s3_settings.s3_endpoint_url, region_name="us-east-1")
    client.put_object(Bucket=bucket, Key=f"{prefix}/{stray}", Body=b"")
    store, clock = open_store(s3_settings), LateClock()
    publish(Registry(store, clock), "one")
    store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    went = collector(store, clock).collect()
    assert went.blobs == (layout.blob(sha256_hex(b"orphan")),)
    assert stray in {each.key for each in store.list("")}


def test_deleted_versions_and_orphans_go_and_all_else_stays(store: ObjectStore) -> None:
    clock = LateClock()
    registry = Registry(store, clock)
    publish(registry, "one")
    two = publish(registry, "two")
    publish(registry, "three", name=OTHER)
    registry.delete(OTHER)
    store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    registry.move_alias(NAME, "latest", version_of("one"))
    registry.delete_version(NAME, two)

    found = collector(store, clock).find()
    assert found.versions == ((OTHER, version_of("three")), (NAME, two))
    assert blobs_in(store) == blobs_of("one", "two", "three") | {sha256_hex(b"orphan")}, "a look"
    went = collector(store, clock).collect()
    assert went == found
    assert blobs_in(store) == blobs_of("one")
    assert_whole(registry, NAME, version_of("one"))
    assert list(registry.list()) == [NAME]
    assert collector(store, clock).collect().versions == ()


def test_what_went_can_be_published_again_and_its_alias_counts_on(store: ObjectStore) -> None:
    clock = LateClock()
    registry = Registry(store, clock)
    publish(registry, "one")
    publish(registry, "two")
    registry.delete(NAME)
    collector(store, clock).collect()
    assert blobs_in(store) == set()
    assert_whole(registry, NAME, publish(registry, "one"))
    assert registry.aliases(NAME)["latest"].generation == 3
    assert registry.list().keys() == {NAME}


def test_nothing_goes_before_its_grace_period(store: ObjectStore) -> None:
    clock = LateClock()
    registry = Registry(store, clock)
    publish(registry, "one")
    registry.delete(NAME)
    store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    patient = collector(store, clock, grace_s=3600)
    assert patient.collect().num_bytes == 0 and patient.find().versions == ()
    assert blobs_in(store) == blobs_of("one") | {sha256_hex(b"orphan")}


def test_each_version_has_a_grace_period_of_its_own(tmp_path: Path) -> None:
    now_s = [1000.0]
    registry = Registry(LocalObjectStore(tmp_path), lambda: now_s[0])
    versions = [publish(registry, text) for text in ("one", "two", "three")]
    registry.delete_version(NAME, versions[0])
    now_s[0] += 3000
    registry.delete_version(NAME, versions[1])
    now_s[0] += 1000
    found = Collector(registry, LocalObjectStore(tmp_path), grace_s=3600, clock=lambda: now_s[0])
    assert found.find().versions == ((NAME, versions[0]),)


def test_old_versions_go_only_when_asked_for_and_no_alias_remembers_them(
    store: ObjectStore,
) -> None:
    clock = LateClock()
    registry = Registry(store, clock)
    silent = [
        publish(registry, f"silent {number}", alias=None, created_s=number) for number in range(4)
    ]
    kept = [publish(registry, f"named {number}", created_s=-1.0) for number in range(3)]
    assert collector(store, clock).collect().versions == ()
    cleaner = collector(store, clock)
    assert cleaner.old_versions(2) == [(NAME, version) for version in silent[:2]]
    assert cleaner.delete_old_versions(2) == [(NAME, version) for version in silent[:2]]
    assert cleaner.old_versions(2) == []
    assert len(cleaner.collect().versions) == 2
    for version in (*silent[2:], *kept):
        assert_whole(registry, NAME, version)
    with pytest.raises(InvalidRequestError):
        cleaner.old_versions(-1)


def test_while_a_version_cannot_be_read_no_file_goes(store: ObjectStore) -> None:
    clock = LateClock()
    registry = Registry(store, clock)
    version = publish(registry, "one")
    store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    store.put(layout.blob(version), b"?")
    with pytest.raises(AdapterCorruptError, match=version[:12]):
        collector(store, clock).collect()
    assert sha256_hex(b"orphan") in blobs_in(store)


def test_two_collections_do_not_run_at_once_and_a_dead_one_is_waited_for_no_longer_than_its_lease(
    store: ObjectStore,
) -> None:
    clock = LateClock()
    store.put(layout.blob(sha256_hex(b"orphan")), b"orphan")
    other = Sweep(collector="other", keys=("blobs/sha256/x",), ends_s=clock() + LEASE_S)
    store.put(layout.SWEEP, encode(other))
    with pytest.raises(OverloadedError, match="another garbage collection"):
        collector(store, clock).collect()
    clock.sleep(LEASE_S)
    assert len(collector(store, clock).collect().blobs) == 1


# -- at the same time ----------------------------------------------------------------------------


class World:
    """A registry on disk with a deleted version, an orphan of a publisher that was killed, and one that stays."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalObjectStore(folder)
        self.clock = LateClock()
        registry = self.registry(self.store)
        publish(registry, "stays")
        publish(registry, "deleted", name=OTHER)
        registry.delete(OTHER)
        publish(registry, "one of two", alias=None)
        registry.delete_version(NAME, version_of("one of two"))
        for key in ("orphan", "deleted"):
            for data in files_of(key).values():
                self.store.put(layout.blob(sha256_hex(data)), data)

        self.waits = threading.Event()
        self.publisher: threading.Thread | None = None

    def registry(self, store: ObjectStore) -> Registry:
        return Registry(store, self.clock, self._wait)

    def _wait(self, _: float) -> None:
        self.waits.set()
        time.sleep(0.001)

    def publish(self, store: ObjectStore, text: str) -> None:
        publish(self.registry(store), text, name=OTHER if text == "deleted" else NAME)

    def publish_until_it_waits(self, text: str) -> None:
        """It waits for a collection that is under way to end; what is left of it then runs beside the rest of that."""
        self.publisher = threading.Thread(target=self.publish, args=(self.store, text))
        self.publisher.start()
        while self.publisher.is_alive() and not self.waits.wait(0.001):
            pass

    def collect(self, store: ObjectStore) -> None:
        collector(store, self.clock).collect()


def _interleaved(folder: Path, text: str, is_collection_first: bool) -> Iterator[World]:
    for at in itertools.count():
        world = World(folder / str(at))
        if is_collection_first:
            interrupting = InterruptingStore(
                world.store, at, partial(world.publish_until_it_waits, text)
            )
            world.collect(interrupting)
        else:
            interrupting = InterruptingStore(world.store, at, partial(world.collect, world.store))
            world.publish(interrupting, text)
        if not interrupting.has_happened:
            assert at > 10, "nothing was interrupted: this test proved nothing"
            return
        if world.publisher is not None:
            world.publisher.join()
        yield world


@pytest.mark.parametrize(
    ("text", "is_collection_first"),
    [("deleted", True), ("orphan", True), ("one of two", False), ("deleted", False)],
)
def test_a_publish_in_any_interleaving_with_a_collection_is_whole(
    tmp_path: Path, text: str, is_collection_first: bool
) -> None:
    name = OTHER if text == "deleted" else NAME
    for world in _interleaved(tmp_path, text, is_collection_first):
        registry = world.registry(world.store)
        for _ in range(2):
            assert_whole(registry, name, version_of(text))
            assert_whole(registry, NAME, version_of("stays"))
            assert registry.resolve(name) == version_of(text)
            world.clock.sleep(2 * LEASE_S)
            world.collect(world.store)
        assert blobs_in(world.store) == blobs_of("stays", text)


def test_publishers_beside_collections_lose_nothing(store: ObjectStore) -> None:
    """Everybody at once, with no grace period at all, on the same few contents."""
    stop = threading.Event()
    published: list[set[AdapterVersion]] = [set() for _ in range(3)]

    def clean() -> int:
        runs = 0
        while not stop.is_set():
            # With no grace period it may meet a version whose files are about to be written again.
            with suppress(AdapterCorruptError):
                collector(store, time.time).collect()
                runs += 1
        return runs

    def run(number: int) -> None:
        registry, name = Registry(store), AdapterName("team", f"p{number}")
        for step in range(12):
            version = publish(registry, f"{step % 4}", name=name)
            assert_whole(registry, name, version)
            published[number].add(version)
            if step % 4 == 3:
                registry.delete(name)
                published[number].clear()
            assert {each.version for each in registry.versions(name)} == published[number]

    with ThreadPoolExecutor(4) as threads:
        cleaning = threads.submit(clean)
        try:
            list(threads.map(run, range(3)))
        finally:
            stop.set()
        assert cleaning.result() > 1
