"""The index is a cache: quick to follow, never the truth, and made anew whenever it is not what the records say."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage import layout
from storage.config import StorageSettings
from storage.errors import StoreUnavailableError
from storage.identity import AdapterName
from storage.index import claim_comparison, reconcile
from storage.index_entry import AdapterEntry
from storage.index_reader import COMPARE_S, IndexReader
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.passing_store import PassingStore
from tests.storage.s3_server import S3Server
from tests.storage.versions import NAME, publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def named(number: int) -> AdapterName:
    return AdapterName("team", f"a{number}")


def fill(registry: Registry, count: int) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(lambda number: publish(registry, "same", name=named(number)), range(count))
        )


def test_what_changed_costs_a_handful_of_requests_however_many_adapters_there_are(
    s3_api: S3Server, s3_settings: StorageSettings
) -> None:
    store, clock = open_store(s3_settings), Clock()
    registry = Registry(store, clock)
    fill(registry, 60)
    reader = IndexReader(store, clock)
    assert len(reader.read().adapters) == 60

    def requests(read: Callable[[], object]) -> list[str]:
        begin = len(s3_api.requests)
        read()
        return s3_api.requests[begin:]

    first = reader.read()
    assert requests(reader.read) == ["GET"], "the generation"
    assert reader.read() is first
    publish(registry, "new", name=named(7))
    assert requests(reader.read) == ["GET"] * 4, (
        "the generation, one listing of shards, the one that changed, one listing of quarantines"
    )
    fresh = reader.read()
    assert fresh.adapters[named(7)].aliases["latest"].version == version_of("new")
    same = [name for name in first.adapters if fresh.adapters[name] is first.adapters[name]]
    assert set(first.adapters).difference(same) == {named(7)}


@pytest.mark.parametrize(
    "lost", ["all", "shard", "mark", "damaged", "unknown format", "generation"]
)
def test_an_index_that_is_lost_or_damaged_is_made_from_the_records(
    store: ObjectStore, lost: str
) -> None:
    clock = Clock()
    registry = Registry(store, clock)
    fill(registry, 3)
    registry.pin(named(0), 2)
    registry.delete(named(1))
    following = IndexReader(store, clock)
    whole = following.read()
    shard = layout.shard(named(0))
    match lost:
        case "all":
            for each in list(store.list(layout.INDEX)):
                store.delete(each.key)
        case "shard":
            store.delete(shard)
        case "mark":
            store.delete(layout.INDEX_IS_WHOLE)
            store.delete(shard)
        case "damaged":
            store.put(shard, b'{"format"')
        case "unknown format":
            store.put(shard, b'{"format": 99, "adapters": []}')
        case "generation":
            store.put(layout.GENERATION, b"?")
    clock.now_s += COMPARE_S  # a lost shard looks like no shard to whoever has not seen it
    for reader in (following, IndexReader(store, clock)):
        found = reader.read()
        assert {name: strip(entry) for name, entry in found.adapters.items()} == {
            name: strip(entry) for name, entry in whole.adapters.items()
        }
    assert reconcile(store, anew=True) == []
    publish(registry, "more", name=named(2))
    assert following.read().adapters[named(2)].aliases["latest"].version == version_of("more")


def strip(entry: AdapterEntry) -> AdapterEntry:
    return entry.model_copy(update={"revision": 0})


def test_a_lost_shard_is_missed_at_once_by_whoever_knew_it(store: ObjectStore) -> None:
    clock = Clock()
    registry = Registry(store, clock)
    fill(registry, 3)
    reader = IndexReader(store, clock)
    reader.read()
    store.delete(layout.shard(named(0)))
    publish(registry, "new", name=named(1))
    assert reader.read().adapters.keys() == {named(0), named(1), named(2)}


def test_a_registry_from_before_the_index_is_read_whole(store: ObjectStore) -> None:
    registry = Registry(store)
    fill(registry, 3)
    for each in list(store.list(layout.INDEX)):
        store.delete(each.key)
    publish(registry, "new", name=named(9))
    assert Registry(store).list().keys() == {named(0), named(1), named(2), named(9)}


class _NoIndexStore(PassingStore):
    """Takes no write below `index/`."""

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        return self._checked(key) and super().compare_and_swap(key, data, etag)

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._checked(key) and super().put_if_absent(key, data)

    def _checked(self, key: str) -> str:
        if key.startswith(layout.INDEX):
            raise StoreUnavailableError("the store is away")
        return key


def test_a_publish_that_cannot_reach_the_index_is_published_and_found_in_the_end(
    store: ObjectStore,
) -> None:
    clock = Clock()
    publish(Registry(store, clock), "old")
    reader = IndexReader(store, clock)
    reader.read()
    failing = Registry(_NoIndexStore(store), clock)
    new = publish(failing, "new")
    failing.move_alias(NAME, "prod", new)
    assert Registry(store).resolve(NAME) == new
    clock.now_s += COMPARE_S
    entry = reader.read().adapters[NAME]
    assert entry.aliases["latest"].version == entry.aliases["prod"].version == new


def test_of_many_readers_one_compares_in_each_period(store: ObjectStore) -> None:
    now_s = 5000.0
    with ThreadPoolExecutor(8) as threads:
        claims = list(threads.map(lambda _: claim_comparison(store, now_s, COMPARE_S), range(8)))
    assert sum(claims) == 1
    assert not claim_comparison(store, now_s + COMPARE_S / 2, COMPARE_S)
    assert claim_comparison(store, now_s + COMPARE_S, COMPARE_S)
    assert claim_comparison(store, now_s - 999, COMPARE_S), "the last one's clock was ahead"


def test_pages_are_in_order_and_complete(store: ObjectStore) -> None:
    registry = Registry(store)
    fill(registry, 7)
    publish(registry, "same", name=AdapterName("other", "a3"))
    pages, after = [], None
    while page := registry.list("team", limit=3, after=after):
        pages.append([name.name for name in page])
        after = next(reversed(page))
    assert pages == [["a0", "a1", "a2"], ["a3", "a4", "a5"], ["a6"]]
    everybodys: list[AdapterName] = []
    while page := registry.list(limit=3, after=everybodys[-1] if everybodys else None):
        everybodys += page
    assert everybodys == list(registry.list()), "the tenants' names overlap"
    assert len(registry.list()) == 8 and list(registry.list("nobody")) == []


def test_an_alias_tells_what_it_meant_before(store: ObjectStore) -> None:
    registry = Registry(store)
    versions = [publish(registry, str(number)) for number in range(20)]
    meant = registry.list()[NAME].aliases["latest"]
    assert (meant.version, meant.generation) == (versions[-1], 20)
    assert meant.earlier == tuple(reversed(versions[3:-1])), "the last sixteen"
    registry.delete_version(NAME, versions[10])
    assert versions[10] not in registry.list()[NAME].aliases["latest"].earlier
