"""Large objects come in parallel ranges, whole and checked, whatever happens to one of the ranges."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import AdapterCorruptError, StoreUnavailableError
from storage.identity import sha256_hex
from storage.layout import blob
from storage.local_store import LocalObjectStore
from storage.manifest import FileEntry
from storage.object_store import ObjectNotFoundError, ObjectStore
from storage.ranged_reads import PART_BYTES, PARTS_AT_ONCE, read_object
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.passing_store import PassingStore
from tests.storage.s3_server import Failure, S3Server

LARGE = b"".join(number.to_bytes(4, "little") for number in range((2 * PART_BYTES + 400) // 4))
ENTRY = FileEntry(sha256=sha256_hex(LARGE), num_bytes=len(LARGE))
KEY = blob(ENTRY.sha256)
PARTS = [(0, PART_BYTES), (PART_BYTES, 2 * PART_BYTES), (2 * PART_BYTES, len(LARGE))]


def test_a_large_file_is_the_same_in_parts(store: ObjectStore, registry: Registry) -> None:
    store.put(KEY, LARGE)
    assert registry.read_file(ENTRY) == LARGE
    with pytest.raises(ObjectNotFoundError):
        read_object(store, "blobs/none", len(LARGE))


@pytest.mark.parametrize("where", [0, PART_BYTES, len(LARGE) - 1])
def test_one_flipped_byte_in_any_part_is_refused(
    store: ObjectStore, registry: Registry, where: int
) -> None:
    damaged = bytearray(LARGE)
    damaged[where] ^= 1
    store.put(KEY, bytes(damaged))
    with pytest.raises(AdapterCorruptError, match=ENTRY.sha256):
        registry.read_file(ENTRY)


@pytest.mark.parametrize("num_bytes", [0, PART_BYTES, PART_BYTES + 5, len(LARGE) - 1])
def test_an_object_that_ends_early_is_refused(
    local_settings: StorageSettings, num_bytes: int
) -> None:
    store = open_store(local_settings)
    store.put(KEY, LARGE[:num_bytes])
    with pytest.raises(AdapterCorruptError, match="damaged"):
        Registry(store).read_file(ENTRY)


def test_s3_is_asked_for_ranges_of_large_files_only(
    s3_api: S3Server, s3_settings: StorageSettings
) -> None:
    store = open_store(s3_settings)
    small = FileEntry(sha256=sha256_hex(b"small"), num_bytes=5)
    store.put(KEY, LARGE)
    store.put(blob(small.sha256), b"small")
    s3_api.requests.clear()
    s3_api.ranges.clear()
    assert Registry(store).read_file(ENTRY) == LARGE
    assert sorted(s3_api.ranges) == sorted(f"bytes={a}-{b - 1}" for a, b in PARTS)
    assert s3_api.requests == ["GET"] * 3
    assert Registry(store).read_file(small) == b"small"
    assert s3_api.requests == ["GET"] * 4 and len(s3_api.ranges) == 3


@pytest.mark.parametrize(
    "failure", [Failure("503 Slow Down", "SlowDown"), Failure(), Failure(is_cut=True)]
)
def test_an_interrupted_range_is_asked_for_again(
    s3_api: S3Server, s3_settings: StorageSettings, failure: Failure
) -> None:
    store = open_store(s3_settings)
    store.put(KEY, LARGE)
    s3_api.ranges.clear()
    s3_api.failures.append(failure)
    assert Registry(store).read_file(ENTRY) == LARGE
    assert len(s3_api.ranges) == 4


def test_a_file_that_is_replaced_between_ranges_is_never_served(
    s3_settings: StorageSettings,
) -> None:
    class Replaced(PassingStore):
        """Its object changes once its first part was read."""

        num_ranges = 0

        def get_range(self, key: str, start: int, stop: int) -> bytes:
            with turn:
                data = super().get_range(key, start, stop)
                if not self.num_ranges:
                    self.store.put(key, bytes(len(LARGE)))
                self.num_ranges += 1
            return data

    turn = threading.Lock()
    store = Replaced(open_store(s3_settings))
    store.put(KEY, LARGE)
    with pytest.raises(AdapterCorruptError):
        Registry(store).read_file(ENTRY)
    assert store.num_ranges == len(PARTS)


def test_all_reads_together_are_bounded_and_run_at_once(tmp_path: Path) -> None:
    class Counting(PassingStore):
        """Holds its readers until as many as may are there."""

        num_reading = 0
        most = 0

        def get_range(self, key: str, start: int, stop: int) -> bytes:
            with changed:
                self.num_reading += 1
                self.most = max(self.most, self.num_reading)
                changed.notify_all()
                changed.wait_for(lambda: self.most >= PARTS_AT_ONCE, timeout=30)
            data = super().get_range(key, start, stop)
            with changed:
                self.num_reading -= 1
            return data

    changed = threading.Condition()
    store = Counting(LocalObjectStore(tmp_path))
    store.put(KEY, LARGE)
    found: list[bytes] = []
    loads = [
        threading.Thread(target=lambda: found.append(read_object(store, KEY, len(LARGE))))
        for _ in range(4)
    ]
    for load in loads:
        load.start()
    for load in loads:
        load.join()
    assert found == [LARGE] * 4
    assert store.most == PARTS_AT_ONCE


def test_one_part_that_fails_fails_the_read(tmp_path: Path) -> None:
    class Away(PassingStore):
        def get_range(self, key: str, start: int, stop: int) -> bytes:
            if start:
                raise StoreUnavailableError("the S3 bucket does not answer")
            return super().get_range(key, start, stop)

    store = Away(LocalObjectStore(tmp_path))
    store.put(KEY, LARGE)
    with pytest.raises(StoreUnavailableError):
        Registry(store).read_file(ENTRY)
