"""The list of models is made once for each state of the registry, says what a tenant may use, and is cut into pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.published import Published, PublishedAdapter, PublishedReader
from deployments.model_list import ModelEntry, ModelListReader, list_body, page_of
from storage.identity import SHARED_TENANT, AdapterName, sha256_hex
from storage.local_store import LocalObjectStore
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from tests.cluster.clocks import ManualClock


class Shelf:
    """A list over a real registry."""

    def __init__(self, directory: Path) -> None:
        self.registry = Registry(LocalObjectStore(directory), ManualClock())
        self.list = ModelListReader(PublishedReader(self.registry).read, "base")

    def publish(self, name: str, tenant: str = "ann", rank: int = 1) -> None:
        data = f"{name} {rank}".encode()
        entry = FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
        content = ManifestContent(files={"f": entry}, family="lora", ranks={"q": rank}, dtype="f32")
        self.registry.publish(
            AdapterName(tenant, name),
            {"f": data},
            content,
            provenance=Provenance(created_s=float(rank)),
        )

    def ids(self, tenant: str) -> list[str]:
        return [entry.id for entry in self.list.read().entries(tenant)]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_nothing_is_made_again_while_nothing_changes(shelf: Shelf) -> None:
    for name in ("a", "b", "c"):
        shelf.publish(name)
    first = shelf.list.read()
    assert shelf.list.read() is first
    shelf.publish("b", rank=2)
    second = shelf.list.read()
    before = {entry.id: entry.body for entry in first.entries("ann")}
    after = {entry.id: entry.body for entry in second.entries("ann")}
    assert after["a"] is before["a"] and after["c"] is before["c"]
    assert json.loads(after["b"])["created"] == 2


def test_a_tenant_sees_its_own_and_what_is_shared_by_name(shelf: Shelf) -> None:
    for tenant, name in (("ann", "b"), ("ann", "d"), ("bob", "x")):
        shelf.publish(name, tenant)
    for name in ("a", "d", "z"):
        shelf.publish(name, SHARED_TENANT)
    assert shelf.ids("ann") == ["a", "b", "d", "z"]
    assert shelf.ids("bob") == ["a", "d", "x", "z"]
    assert shelf.ids(SHARED_TENANT) == ["a", "d", "z"]
    assert shelf.ids("nobody") == ["a", "d", "z"]
    found = [shelf.list.read().find(tenant, "d") for tenant in ("ann", "bob")]
    assert [each and each.name.tenant for each in found] == ["ann", SHARED_TENANT]
    assert shelf.list.read().find("bob", "b") is None


def test_what_is_deleted_leaves_the_list(shelf: Shelf) -> None:
    shelf.publish("a")
    shelf.publish("b")
    assert shelf.ids("ann") == ["a", "b"]
    shelf.registry.delete(AdapterName("ann", "a"))
    assert shelf.ids("ann") == ["b"]


NAMES = st.text("abc", min_size=1, max_size=3)


@given(names=st.sets(NAMES, max_size=12), limit=st.integers(1, 5), gone=NAMES)
def test_pages_together_are_the_list_from_any_place_on(
    names: set[str], limit: int, gone: str
) -> None:
    entries = [
        ModelEntry(PublishedAdapter(AdapterName("ann", name)), name.encode())
        for name in sorted(names)
    ]
    for start in (None, gone):
        seen: list[str] = []
        after = start
        while True:
            page = page_of(entries, after, limit)
            seen += [entry.id for entry in page.entries]
            if not page.has_more:
                break
            assert len(page.entries) == limit
            after = page.entries[-1].id
        assert seen == [name for name in sorted(names) if start is None or name > start]
    assert page_of(entries, None, None).has_more is False


def test_a_list_is_openais_object() -> None:
    body = list_body([b'{"id":"a"}', b'{"id":"b"}'], "a", "b", True)
    assert json.loads(body) == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    assert json.loads(list_body([], None, None, False))["data"] == []


def test_an_empty_registry_is_an_empty_list() -> None:
    published = Published()
    assert ModelListReader(lambda: published, "base").read().entries("ann") == ()
