"""While the registry is away, who needs it is told at once, and it comes back by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import layout, registry_reader
from storage.errors import AdapterCorruptError, StoreUnavailableError, UnknownModelError
from storage.load_stages import StageClock
from storage.local_store import LocalObjectStore
from storage.object_store import StoredObject
from storage.registry import Registry
from storage.registry_reader import PROBE_AWAY_S, PROBE_QUIET_S, RegistryReader
from storage.version_files import entry_of
from tests.storage.passing_store import PassingStore
from tests.storage.versions import publish, version_of


class _Store(PassingStore):
    """Can be away, and can leave readers without an answer. Counts what is asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalObjectStore(folder))
        self.is_away = False
        self.answers = threading.Event()
        self.answers.set()
        self.num_reads = 0

    def get(self, key: str) -> StoredObject:
        self.num_reads += 1
        is_away = self.is_away
        assert self.answers.wait(60)
        if is_away:
            raise StoreUnavailableError("the S3 bucket does not answer")
        return super().get(key)


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> Iterator[_Store]:
    store = _Store(tmp_path)
    yield store
    store.answers.set()


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def reader(store: _Store, clock: _Clock) -> RegistryReader:
    return RegistryReader(Registry(store), clock)


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def _fail(reader: RegistryReader) -> None:
    with pytest.raises(StoreUnavailableError):
        reader.content(version_of("any"), StageClock())


def test_after_a_failure_nobody_tries_but_one_probe_at_a_time(
    store: _Store, reader: RegistryReader, clock: _Clock
) -> None:
    store.is_away = True
    _fail(reader)
    assert store.num_reads == 1 and not reader.is_up()
    for _ in range(5):
        with pytest.raises(StoreUnavailableError, match="does not answer") as told:
            reader.content(version_of("any"), StageClock())
        assert "not kept on this replica" in told.value.message
    assert store.num_reads == 1
    store.answers.clear()
    clock.now_s += PROBE_AWAY_S
    for _ in range(5):
        _fail(reader)
    eventually(lambda: store.num_reads == 2)
    clock.now_s += PROBE_AWAY_S
    _fail(reader)  # at once, though the probe hangs
    assert store.num_reads == 2


def test_it_is_used_again_as_soon_as_a_probe_was_answered(
    store: _Store, reader: RegistryReader, clock: _Clock
) -> None:
    version = publish(Registry(store), "one")
    store.is_away = True
    _fail(reader)
    store.is_away = False
    assert not reader.is_up()
    clock.now_s += PROBE_AWAY_S
    eventually(reader.is_up)
    assert reader.content(version, StageClock()).version == version


def test_an_outage_is_noticed_though_nobody_reads(
    store: _Store, reader: RegistryReader, clock: _Clock
) -> None:
    assert reader.is_up() and not store.num_reads
    store.is_away = True
    clock.now_s += PROBE_QUIET_S
    eventually(lambda: not reader.is_up())
    assert store.num_reads == 1


def test_an_unknown_version_is_an_answer(
    store: _Store, reader: RegistryReader, clock: _Clock
) -> None:
    for _ in range(2):
        with pytest.raises(UnknownModelError):
            reader.content(version_of("never published"), StageClock())
    assert reader.is_up()


def test_a_read_that_hung_since_before_the_outage_ended_closes_nothing(
    store: _Store, reader: RegistryReader, clock: _Clock
) -> None:
    version = publish(Registry(store), "one")
    store.is_away = True
    store.answers.clear()
    hanging = threading.Thread(target=_fail, args=(reader,))
    hanging.start()
    eventually(lambda: store.num_reads > 0)
    hung, store.answers = store.answers, threading.Event()
    store.answers.set()
    store.is_away = False
    clock.now_s += 1
    assert reader.content(version, StageClock()).version == version
    hung.set()
    hanging.join()
    assert reader.is_up()


def test_what_is_damaged_on_its_way_is_read_again_and_what_is_damaged_there_is_refused(
    tmp_path: Path, clock: _Clock
) -> None:
    class Noisy(PassingStore):
        """The next answers have one byte flipped."""

        num_flips = 0

        def get(self, key: str) -> StoredObject:
            found = super().get(key)
            if not self.num_flips:
                return found
            self.num_flips -= 1
            return StoredObject(bytes([found.data[0] ^ 1]) + found.data[1:], found.etag)

    store = Noisy(LocalObjectStore(tmp_path))
    version = publish(Registry(store), "one")
    reader = RegistryReader(Registry(store), clock)
    store.num_flips = 1
    content = reader.content(version, StageClock())
    entry = content.files["adapter_model.safetensors"]
    store.num_flips = 2
    with pytest.raises(AdapterCorruptError):
        reader.read_file(entry, StageClock())
    store.num_flips = 1
    assert reader.read_file(entry, StageClock()) == b"one"
    assert reader.is_up()


def test_a_small_file_is_read_once_and_kept_by_its_digest(
    store: _Store, reader: RegistryReader
) -> None:
    entries = [
        entry
        for text in ("one", "two")
        for version in (publish(Registry(store), text),)
        for entry in reader.content(version, StageClock()).files.values()
    ]
    store.num_reads = 0
    read = [reader.read_file(entry, StageClock()) for entry in entries]
    assert [entry_of(data) for data in read] == entries
    assert store.num_reads == len(set(entries)) < len(entries)
    store.is_away = True
    assert [reader.read_file(entry, StageClock()) for entry in entries] == read


def test_no_more_small_files_are_kept_than_there_is_room_for(
    store: _Store, reader: RegistryReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_reader, "MAX_SMALL_FILES", 2)
    monkeypatch.setattr(registry_reader, "SMALL_FILE_BYTES", 5)
    texts = (b"one", b"two", b"three", b"larger")
    for data in texts:
        store.put(layout.blob(entry_of(data).sha256), data)

    def num_reads(*wanted: bytes) -> int:
        before = store.num_reads
        for data in wanted:
            assert reader.read_file(entry_of(data), StageClock()) == data
        return store.num_reads - before

    assert num_reads(b"one", b"two", b"one") == 2
    assert num_reads(b"three", b"one") == 1  # what was used longest ago went
    assert num_reads(b"two") == 1
    assert num_reads(b"larger", b"larger") == 2
