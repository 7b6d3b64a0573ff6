"""An engine over real tiers and a real registry, through damage and outages."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest

from storage import layout
from storage.adapter_cache import AdapterCache
from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import read_base_facts
from storage.config import StorageSettings
from storage.errors import AdapterCorruptError, StoreUnavailableError, UnknownModelError
from storage.formats.writing import write_flora
from storage.identity import AdapterName, AdapterVersion
from storage.object_store import ObjectStore
from storage.publishing import publish_adapter
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.s3_server import S3Server, s3_server
from tests.workers.engine.small_engine import (
    Fetched,
    Shelf,
    greedy,
    projections,
    prompt,
    random_adapter,
    small_engine,
    small_settings,
)
from tests.workers.engine.transports import Inbox, eventually
from workers.engine.building import build_engine
from workers.engine.request import FinishReason
from workers.engine.thread_client import ThreadEngineClient

TENSORS = "adapter_model.safetensors"


@dataclass
class Replica:
    """An engine, its cache, and the registry both read; `ask` waits for an answer."""

    client: ThreadEngineClient
    cache: AdapterCache
    inbox: Inbox = field(default_factory=Inbox)

    def ask(self, version: AdapterVersion | None) -> list[int] | Exception:
        name = self.submit(version)
        answer = self.inbox.wait_for_ends(name)[name]
        if answer.error is not None:
            return answer.error
        assert answer.reason is FinishReason.LENGTH
        return answer.tokens

    def submit(self, version: AdapterVersion | None) -> str:
        name = uuid.uuid4().hex
        self.client.submit(greedy(name, prompt(3, 6), version, max_tokens=4))
        return name


@dataclass
class Shop:
    """A registry, and replicas of it that share a disk."""

    base: Path
    settings: StorageSettings
    store: ObjectStore
    replicas: list[Replica] = field(default_factory=list)

    def publish(self, seed: int) -> AdapterVersion:
        facts = read_base_facts(self.base, "tiny")
        rows = random_adapter(projections(self.base), "flora", 1, seed=seed)
        files = write_flora(AdapterRows(rows.modules, facts.digest), "tiny")
        name = AdapterName("team", f"adapter-{seed}")
        return publish_adapter(Registry(self.store), name, files, facts).version

    def replica(self) -> Replica:
        cache = AdapterCache(Registry(self.store), self.settings)
        engine = build_engine(small_settings(self.base), cache)
        one = Replica(ThreadEngineClient(engine, cache), cache)
        one.client.start(one.inbox)
        self.replicas.append(one)
        return one

    def blob(self, version: AdapterVersion) -> str:
        return layout.blob(Registry(self.store).content(version).files[TENSORS].sha256)

    def cached(self, version: AdapterVersion) -> Path:
        return self.settings.cache_dir / "adapters" / version / TENSORS


@pytest.fixture(scope="module")
def s3_api() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_shop(s3_api: S3Server, tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Shop]:
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=s3_api.url).create_bucket(Bucket=bucket)
    settings = StorageSettings(
        registry=f"s3://{bucket}/registry",
        s3_endpoint_url=s3_api.url,
        s3_timeout_s=1.0,
        cache_dir=tmp_path / "cache",
    )
    yield from _shop(tiny_llama_dir, settings)


@pytest.fixture
def local_shop(tiny_llama_dir: Path, tmp_path: Path) -> Iterator[Shop]:
    settings = StorageSettings(registry=str(tmp_path / "registry"), cache_dir=tmp_path / "cache")
    yield from _shop(tiny_llama_dir, settings)


@pytest.fixture(params=["local", "s3"])
def shop(request: pytest.FixtureRequest) -> Shop:
    chosen: Shop = request.getfixturevalue(f"{request.param}_shop")
    return chosen


def _shop(base: Path, settings: StorageSettings) -> Iterator[Shop]:
    shop = Shop(base, settings, open_store(settings))
    yield shop
    for replica in shop.replicas:
        replica.client.stop()


def _flipped(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


def test_a_flipped_byte_in_the_registry_is_told_and_reported_and_nothing_of_it_served(
    shop: Shop,
) -> None:
    good, bad = shop.publish(1), shop.publish(2)
    shop.store.put(shop.blob(bad), _flipped(shop.store.get(shop.blob(bad)).data))
    replica = shop.replica()
    asked = [replica.submit(bad) for _ in range(3)]
    ended = replica.inbox.wait_for_ends(*asked)
    for name in asked:
        assert isinstance(ended[name].error, AdapterCorruptError) and not ended[name].tokens
    assert isinstance(replica.ask(good), list)
    load = replica.client.load()
    assert [(one.version, one.code) for one in load.failed] == [(bad, "adapter_corrupt")]
    assert load.is_registry_up
    assert bad not in {*load.device, *load.host, *load.disk}


def test_a_flipped_byte_on_disk_is_fetched_again_and_answers_the_same(shop: Shop) -> None:
    version = shop.publish(1)
    first = shop.replica().ask(version)
    assert isinstance(first, list)
    damaged = _flipped(shop.cached(version).read_bytes())
    shop.cached(version).write_bytes(damaged)
    replica = shop.replica()
    assert replica.ask(version) == first != replica.ask(None)
    assert not replica.client.load().failed
    assert shop.cached(version).read_bytes() != damaged
    assert shop.replica().cache.get(version).tier == "disk"


def test_while_s3_does_not_answer_what_is_near_serves_and_the_rest_is_refused_until_it_is_back(
    s3_shop: Shop, s3_api: S3Server
) -> None:
    resident, on_disk, *far = (s3_shop.publish(seed) for seed in range(6))
    s3_shop.replica().ask(on_disk)
    replica = s3_shop.replica()
    answers = [replica.ask(resident)]
    s3_api.may_answer.clear()
    try:
        stuck = [replica.submit(version) for version in far[:3]]  # more than there are threads
        answers += [replica.ask(resident), replica.ask(on_disk), replica.ask(None)]
        assert all(isinstance(one, list) for one in answers) and answers[0] == answers[1]
        ended = replica.inbox.wait_for_ends(*stuck)
        assert all(isinstance(ended[name].error, StoreUnavailableError) for name in stuck)
        eventually(lambda: not replica.client.load().is_registry_up)
        refused = replica.ask(far[3])
        assert isinstance(refused, StoreUnavailableError)
        assert "not kept on this replica" in refused.message
        assert replica.ask(on_disk) == answers[2]
        assert not replica.client.load().failed
    finally:
        s3_api.may_answer.set()
    eventually(lambda: replica.client.load().is_registry_up)
    eventually(lambda: isinstance(replica.ask(far[3]), list))


def test_a_version_that_did_not_exist_answers_once_it_is_published(shop: Shop) -> None:
    version = shop.publish(1)
    described = shop.store.get(layout.blob(version)).data
    shop.store.delete(layout.blob(version))
    replica = shop.replica()
    assert isinstance(replica.ask(version), UnknownModelError)
    assert not replica.client.load().failed
    shop.store.put(layout.blob(version), described)
    eventually(lambda: isinstance(replica.ask(version), list))


def test_all_who_wait_for_a_load_that_fails_are_told_in_the_same_step(
    tiny_llama_dir: Path,
) -> None:
    may_fail = threading.Event()

    class Slow(Shelf):
        def get(self, wanted: AdapterVersion) -> Fetched:
            assert may_fail.wait(60)
            return super().get(wanted)

    bad = AdapterVersion("b" * 64)
    source = Slow({bad: AdapterCorruptError("the stored file is damaged")})
    engine = small_engine(tiny_llama_dir, source, max_sequences=1)
    engine.submit(greedy("runs", prompt(0, 4), max_tokens=50))
    for number in range(5):
        engine.submit(greedy(f"waits {number}", prompt(0, 4), bad))
    assert not engine.step().outputs[0].error
    may_fail.set()
    told: list[str] = []
    while not told:
        told = [one.request_id for one in engine.step().outputs if one.error is not None]
    assert told == [f"waits {number}" for number in range(5)]
    assert engine.load().misses == 5
    engine.loader.stop()
