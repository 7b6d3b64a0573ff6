"""A replica gets the right rows from the nearest place, never wrong ones, and each only once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import layout
from storage.adapter_cache import FAILURE_KEPT_S, AdapterCache, CachedAdapter
from storage.config import StorageSettings
from storage.errors import (
    AdapterCorruptError,
    AdapterRefusedError,
    StoreUnavailableError,
    UnknownModelError,
)
from storage.identity import AdapterVersion
from storage.local_store import LocalObjectStore
from storage.object_store import StoredObject
from storage.registry import Registry
from storage.registry_reader import PROBE_AWAY_S
from storage.stores import open_store
from tests.storage.passing_store import PassingStore
from tests.storage.published import ROWS_BYTES, is_same, publish_rows
from tests.storage.versions import publish


class _WatchedStore(PassingStore):
    """Counts reads by key, can be away, and can hold readers back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalObjectStore(folder))
        self.reads = Counter[str]()
        self.is_away = False
        self.gate = threading.Event()
        self.gate.set()

    def get(self, key: str) -> StoredObject:
        self.reads[key] += 1
        self.gate.wait()
        return super().get(key)

    def before(self, *, is_write: bool) -> None:
        if self.is_away:
            raise StoreUnavailableError("the registry is away")


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> _WatchedStore:
    return _WatchedStore(tmp_path / "registry")


@pytest.fixture
def registry(store: _WatchedStore) -> Registry:
    return Registry(store)


@pytest.fixture
def cache_settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(cache_dir=tmp_path / "cache")


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cached_file(settings: StorageSettings, version: AdapterVersion, name: str) -> Path:
    return settings.cache_dir / "adapters" / version / name


def test_an_adapter_comes_nearer_with_every_use(
    registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    cache = AdapterCache(registry, cache_settings)
    for tier in ("registry", "host", "host"):
        adapter = cache.get(version)
        assert adapter.tier == tier and is_same(adapter.rows, 1)
    assert cache.host_versions() == cache.disk_versions() == {version}
    restarted = AdapterCache(registry, cache_settings)
    assert restarted.host_versions() == frozenset()
    assert restarted.disk_versions() == {version}
    adapter = restarted.get(version)
    assert adapter.tier == "disk" and is_same(adapter.rows, 1)


def test_what_is_near_keeps_serving_while_the_registry_is_away(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    one, two = publish_rows(registry, 1), publish_rows(registry, 2)
    clock = _Clock()
    cache = AdapterCache(registry, cache_settings, clock)
    cache.get(one)
    store.is_away = True
    assert cache.get(one).tier == "host"
    assert AdapterCache(registry, cache_settings).get(one).tier == "disk"
    with pytest.raises(StoreUnavailableError):
        cache.get(two)
    with pytest.raises(StoreUnavailableError):
        cache.find_near(two)
    near = cache.find_near(one)
    assert near is not None and near.tier == "host"
    store.is_away = False
    clock.now_s += PROBE_AWAY_S
    eventually(cache.is_registry_up)
    assert cache.get(two).tier == "registry", "an outage is not remembered once it is over"


def test_a_replica_that_starts_while_the_registry_is_away_has_what_is_on_its_disk(
    s3_settings: StorageSettings, tmp_path: Path
) -> None:
    chosen = s3_settings.model_copy(update={"cache_dir": tmp_path})
    version = publish_rows(Registry(open_store(chosen)), 1)
    AdapterCache.open(chosen).get(version)
    nobody = chosen.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    adapter = AdapterCache.open(nobody).get(version)
    assert adapter.tier == "disk" and is_same(adapter.rows, 1)


def test_what_is_near_is_found_without_the_registry(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    version, far = publish_rows(registry, 1), publish_rows(registry, 2)
    cache = AdapterCache(registry, cache_settings)
    cache.get(version)
    store.reads.clear()
    for one, tier in ((cache, "host"), (AdapterCache(registry, cache_settings), "disk")):
        found = one.find_near(version)
        assert found is not None and found.tier == tier and is_same(found.rows, 1)
        assert one.find_near(version) is not None and one.host_versions() == {version}
        assert one.find_near(far) is None
        one.check_integrity()
    assert not store.reads


def test_every_stage_of_a_load_is_measured(
    registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    cache = AdapterCache(registry, cache_settings)
    far, near = cache.get(version), AdapterCache(registry, cache_settings).get(version)
    assert far.stage_s.keys() == {"registry", "digest", "parse", "disk_write"}
    assert near.stage_s.keys() == {"disk_read", "digest", "parse"}
    assert all(0 < seconds < 60 for one in (far, near) for seconds in one.stage_s.values())
    assert not cache.get(version).stage_s


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "~content.json"]
)
@pytest.mark.parametrize("is_lost", [False, True], ids=["damaged", "lost"])
def test_a_damaged_file_on_disk_is_fetched_again_and_never_served(
    registry: Registry, cache_settings: StorageSettings, name: str, is_lost: bool
) -> None:
    version = publish_rows(registry, 1)
    AdapterCache(registry, cache_settings).get(version)
    path = _cached_file(cache_settings, version, name)
    if is_lost:
        path.unlink()
    else:
        _flip(path)
    for tier in ("registry", "disk"):
        adapter = AdapterCache(registry, cache_settings).get(version)
        assert adapter.tier == tier and is_same(adapter.rows, 1)


def test_a_damaged_blob_is_refused_briefly_and_found_again_when_repaired(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    entry = registry.content(version).files["adapter_model.safetensors"]
    good = store.get(layout.blob(entry.sha256)).data
    store.put(layout.blob(entry.sha256), good[:-1] + b"?")
    clock = _Clock()
    cache = AdapterCache(registry, cache_settings, clock)
    store.reads.clear()
    for _ in range(3):
        with pytest.raises(AdapterCorruptError, match=entry.sha256):
            cache.get(version)
    assert store.reads[layout.blob(entry.sha256)] == 2, "remembered, not looked up every time"
    assert cache.disk_versions() == frozenset()
    store.put(layout.blob(entry.sha256), good)
    clock.now_s += FAILURE_KEPT_S
    assert cache.get(version).tier == "registry"


def test_an_adapter_that_cannot_be_read_is_refused_and_not_kept(
    registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish(registry, "not a tensor file")
    cache = AdapterCache(registry, cache_settings)
    for _ in range(2):
        with pytest.raises(AdapterRefusedError):
            cache.get(version)
    assert cache.disk_versions() == cache.host_versions() == frozenset()


def test_an_unknown_version_is_not_remembered(
    registry: Registry, cache_settings: StorageSettings, tmp_path: Path
) -> None:
    version = publish_rows(Registry(LocalObjectStore(tmp_path / "elsewhere")), 1)
    cache = AdapterCache(registry, cache_settings)
    with pytest.raises(UnknownModelError):
        cache.get(version)
    publish_rows(registry, 1)
    assert cache.get(version).tier == "registry"


def test_many_who_want_one_adapter_load_it_once(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    cache = AdapterCache(registry, cache_settings)
    store.reads.clear()
    store.gate.clear()
    asking = threading.Semaphore(0)

    def get() -> CachedAdapter:
        asking.release()
        return cache.get(version)

    with ThreadPoolExecutor(8) as threads:
        wanted = [threads.submit(get) for _ in range(8)]
        for _ in wanted:
            asking.acquire()
        time.sleep(0.05)  # one is in the store by now, the others wait for that one
        store.gate.set()
        adapters = [future.result() for future in wanted]
    assert set(store.reads.values()) == {1}
    assert len({id(adapter.rows) for adapter in adapters}) == 1
    cache.check_integrity()


def test_all_who_wait_for_a_failing_load_are_told(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    clock = _Clock()
    cache = AdapterCache(registry, cache_settings, clock)
    store.gate.clear()
    store.is_away = True
    with ThreadPoolExecutor(4) as threads:
        wanted = [threads.submit(cache.get, version) for _ in range(4)]
        store.gate.set()
        for future in wanted:
            with pytest.raises(StoreUnavailableError):
                future.result(timeout=30)
    cache.check_integrity()
    store.is_away = False
    clock.now_s += PROBE_AWAY_S
    eventually(cache.is_registry_up)
    assert is_same(cache.get(version).rows, 1)


def test_one_adapters_slow_load_does_not_hold_up_another(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    near, far = publish_rows(registry, 1), publish_rows(registry, 2)
    cache = AdapterCache(registry, cache_settings)
    cache.get(near)
    store.gate.clear()
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(cache.get, far)
        assert cache.get(near).tier == "host"
        assert not loading.done()
        store.gate.set()
        assert loading.result().tier == "registry"


def test_host_memory_keeps_what_was_used_last_within_its_budget(
    registry: Registry, cache_settings: StorageSettings
) -> None:
    versions = [publish_rows(registry, seed) for seed in range(4)]
    budget = cache_settings.model_copy(update={"host_bytes": 2 * ROWS_BYTES + 1})
    cache = AdapterCache(registry, budget)
    for index in (0, 1, 0, 2):
        cache.get(versions[index])
        cache.check_integrity()
    assert cache.host_versions() == {versions[0], versions[2]}
    assert cache.get(versions[1]).tier == "disk"
    nothing = AdapterCache(registry, cache_settings.model_copy(update={"host_bytes": 0}))
    assert [nothing.get(versions[0]).tier for _ in range(2)] == ["disk", "disk"]


def test_an_adapter_over_the_byte_limit_is_refused_before_it_is_fetched(
    store: _WatchedStore, registry: Registry, cache_settings: StorageSettings
) -> None:
    version = publish_rows(registry, 1)
    limited = cache_settings.model_copy(update={"max_adapter_bytes": 100})
    store.reads.clear()
    with pytest.raises(AdapterRefusedError, match="at most 100"):
        AdapterCache(registry, limited).get(version)
    assert list(store.reads) == [layout.blob(version)]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, list[AdapterVersion]]:
    registry = Registry(LocalObjectStore(tmp_path_factory.mktemp("six")))
    return registry, [publish_rows(registry, seed) for seed in range(6)]


@given(uses=st.lists(st.integers(0, 5), max_size=40), kept=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_any_uses_keep_the_books_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    six: tuple[Registry, list[AdapterVersion]],
    uses: list[int],
    kept: int,
) -> None:
    registry, versions = six
    cache = AdapterCache(
        registry,
        StorageSettings(cache_dir=tmp_path_factory.mktemp("cache"), host_bytes=kept * ROWS_BYTES),
    )
    last: list[int] = []
    for seed in uses:
        adapter = cache.get(versions[seed])
        assert is_same(adapter.rows, seed)
        assert adapter.tier == ("host" if seed in last else adapter.tier)
        last = [*(other for other in last if other != seed), seed][-kept:] if kept else []
        assert cache.host_versions() == {versions[other] for other in last}
        cache.check_integrity()
