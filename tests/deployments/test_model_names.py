"""What a model name means: the table's word while it is fresh, the registry's else, never the base by accident."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.published import Published, PublishedReader
from cluster.table import AdapterFacts, PlacementTable, TableUpdate
from cluster.view import TableView
from deployments.model_names import ASK_AGAIN_S, ModelNames
from storage.errors import (
    AdapterCorruptError,
    AmbiguousModelError,
    InvalidRequestError,
    StoreUnavailableError,
    UnknownModelError,
)
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.local_store import LocalObjectStore
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from tests.cluster.clocks import ManualClock

BASE = "org/base:7b"
TTL_S = 30.0


class CountingRegistry(Registry):
    """Counts questions; `is_away` makes it unreachable."""

    def __init__(self, directory: Path) -> None:
        super().__init__(LocalObjectStore(directory))
        self.num_asked = 0
        self.is_away = False

    def resolve(self, name: AdapterName, selector: str = "latest") -> AdapterVersion:
        self.num_asked += 1
        if self.is_away:
            raise StoreUnavailableError("the store is away")
        return super().resolve(name, selector)


class Names:
    """Model names over a real registry on disk, with a clock that moves when told."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock()
        self.registry = CountingRegistry(directory)
        self.view = TableView(self.clock)
        self.num_news = 0
        self.reader = PublishedReader(self.registry)
        self.published: Published | None = None
        self.names = self.named(BASE)
        self.loop = asyncio.new_event_loop()

    def named(self, base_id: str) -> ModelNames:
        return ModelNames(
            self.view,
            self.registry,
            lambda: self.published,
            base_id,
            TTL_S,
            self._hear,
            self.clock,
        )

    def list_all(self) -> None:
        """What the server's list of adapters does every second."""
        self.published = self.reader.read()

    def _hear(self) -> None:
        self.num_news += 1

    def publish(self, name: str, rank: int = 2, tenant: str = "default") -> AdapterVersion:
        data = f"{name} {rank}".encode()
        entry = FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
        content = ManifestContent(files={"f": entry}, family="lora", ranks={"q": rank}, dtype="f32")
        return self.registry.publish(
            AdapterName(tenant, name), {"f": data}, content, provenance=Provenance(created_s=1.0)
        )

    def serve(self, name: str, version: AdapterVersion, rank: int = 2) -> None:
        """Let the table know an adapter, as of now."""
        table = self.view.table
        fresh = PlacementTable(
            epoch=table.epoch + 1,
            serving={**table.serving, ("default", name, "latest"): version},
            facts={**table.facts, version: AdapterFacts(rank, 10)},
        )
        assert self.view.offer(TableUpdate.whole(fresh))

    def resolve(self, model: str, tenant: str = "default") -> AdapterVersion | None:
        return self.work(model, tenant)[0]

    def work(self, model: str, tenant: str = "default") -> tuple[AdapterVersion | None, float]:
        resolved = self.loop.run_until_complete(self.names.resolve(model, tenant))
        return resolved.adapters.version, resolved.work_per_token


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    names = Names(tmp_path)
    yield names
    names.loop.close()


def test_the_base_is_the_base_with_and_without_a_table(names: Names) -> None:
    assert names.work(BASE) == (None, 1.0)
    names.serve("poet", names.publish("poet"))
    assert names.work(BASE) == (None, 1.0)


def test_a_fresh_table_answers_without_the_registry(names: Names) -> None:
    version = names.publish("poet", rank=3)
    names.serve("poet", version, rank=3)
    for model in ("poet", f"{BASE}:poet", "poet@latest"):
        assert names.work(model) == (version, 4.0)
    assert names.registry.num_asked == names.num_news == 0


def test_the_table_says_what_serves_while_the_registry_says_what_is_desired(names: Names) -> None:
    old = names.publish("poet", rank=1)
    names.serve("poet", old, rank=1)
    new = names.publish("poet", rank=2)
    assert names.resolve("poet") == old
    assert names.resolve(f"poet@{new}") == new


def test_an_adapter_the_table_does_not_know_yet_answers_by_the_registry(names: Names) -> None:
    names.serve("poet", names.publish("poet"))
    with pytest.raises(UnknownModelError, match="clerk") as caught:
        names.resolve("clerk")
    assert caught.value.param == "model"
    version = names.publish("clerk", rank=5)
    names.clock.advance(ASK_AGAIN_S)
    assert names.num_news == 0
    assert names.work("clerk") == (version, 7.0)  # 5 rows, and a page for a scale that it may have
    assert names.num_news == 1


def test_an_unknown_name_is_asked_once_a_second(names: Names) -> None:
    for _ in range(20):
        with pytest.raises(UnknownModelError):
            names.resolve("nobody")
    assert names.registry.num_asked == 1
    names.clock.advance(ASK_AGAIN_S)
    with pytest.raises(UnknownModelError):
        names.resolve("nobody")
    assert names.registry.num_asked == 2


def test_many_at_once_ask_once(names: Names) -> None:
    version = names.publish("poet")

    async def burst() -> set[AdapterVersion | None]:
        answers = await asyncio.gather(*(names.names.resolve("poet", "default") for _ in range(30)))
        return {answer.adapters.version for answer in answers}

    assert names.loop.run_until_complete(burst()) == {version}
    assert names.registry.num_asked == 1


def test_an_old_table_gives_way_to_the_registry_unless_that_is_away(names: Names) -> None:
    old = names.publish("poet", rank=1)
    names.serve("poet", old, rank=1)
    new = names.publish("poet", rank=2)
    names.clock.advance(TTL_S + 1)
    assert names.resolve("poet") == new
    names.clock.advance(ASK_AGAIN_S)
    names.registry.is_away = True
    assert names.resolve("poet") == old
    with pytest.raises(StoreUnavailableError):
        names.resolve("clerk")


def test_what_is_deleted_is_gone_at_once_though_the_table_has_it_still(names: Names) -> None:
    names.serve("poet", names.publish("poet"))
    names.list_all()
    assert names.resolve("poet") is not None
    names.registry.delete(AdapterName("default", "poet"))
    names.list_all()
    with pytest.raises(UnknownModelError):
        names.resolve("poet")


def test_a_version_is_known_without_the_registry_and_one_in_quarantine_is_refused(
    names: Names,
) -> None:
    old, new = names.publish("poet", rank=1), names.publish("poet", rank=2)
    names.serve("poet", new)
    names.list_all()
    for selector in (old, old[:8], f"sha256:{old}"):
        assert names.resolve(f"poet@{selector}") == old
    assert names.registry.num_asked == 0
    entry = names.registry.content(old).files["f"]
    names.registry._store.put(f"blobs/sha256/{entry.sha256}", b"damaged")
    assert names.registry.quarantine(old, "damaged")
    names.list_all()
    with pytest.raises(AdapterCorruptError, match="in quarantine: damaged"):
        names.resolve(f"poet@{old[:8]}")
    assert names.resolve("poet") == new


def test_a_shared_adapter_is_everybodys_unless_a_tenant_has_one_of_its_name(names: Names) -> None:
    shared, own = names.publish("poet", 1, "shared"), names.publish("poet", 2, "ann")
    names.list_all()
    assert names.resolve("poet", "ann") == own
    assert names.resolve("poet", "bob") == shared
    with pytest.raises(UnknownModelError):  # the tenant's own has no such version
        names.resolve(f"poet@{shared}", "ann")


def test_another_tenants_adapter_is_as_unknown_as_none(names: Names) -> None:
    names.publish("secret", tenant="rival")
    with pytest.raises(UnknownModelError):
        names.resolve("secret")
    assert names.resolve("secret", tenant="rival") is not None


@pytest.mark.parametrize("known_to_table", [True, False])
def test_a_name_that_means_two_things_is_refused(tmp_path: Path, known_to_table: bool) -> None:
    names = Names(tmp_path)
    names.names = names.named("poet")
    version = names.publish("poet")
    if known_to_table:
        names.serve("poet", version)
    else:
        names.list_all()
    with pytest.raises(AmbiguousModelError):
        names.resolve("poet")
    assert names.resolve("poet:poet") == version
    names.loop.close()


@pytest.mark.parametrize("model", [f"{BASE}@latest", "poet@"])
def test_a_malformed_selector_is_refused(names: Names, model: str) -> None:
    names.publish("poet")
    with pytest.raises(InvalidRequestError):
        names.resolve(model)
