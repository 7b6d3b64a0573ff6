"""What is published is read when it changed, and one adapter's damage does not hide the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.published import REREAD_S, PublishedReader
from storage import layout
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.local_store import LocalObjectStore
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from tests.cluster.clocks import ManualClock

POET, CLERK = AdapterName("default", "poet"), AdapterName("default", "clerk")


class Shelf:
    """A real registry on disk and a reader of it."""

    def __init__(self, directory: Path) -> None:
        self.store = LocalObjectStore(directory)
        self.registry = Registry(self.store)
        self.clock = ManualClock()
        self.reader = PublishedReader(self.registry, self.clock)

    def publish(self, name: AdapterName, rank: int) -> AdapterVersion:
        data = f"{name} {rank}".encode()
        entry = FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
        content = ManifestContent(
            files={"f": entry}, family="lora", ranks={"q": 1, "v": rank}, dtype="f32"
        )
        provenance = Provenance(created_s=float(rank))
        return self.registry.publish(name, {"f": data}, content, provenance=provenance)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_an_empty_registry_has_nothing(shelf: Shelf) -> None:
    assert shelf.reader.read().adapters == {}


def test_aliases_versions_and_sizes_are_read(shelf: Shelf) -> None:
    old, new = shelf.publish(POET, 2), shelf.publish(POET, 3)
    shelf.registry.move_alias(POET, "prod", old)
    published = shelf.reader.read()
    assert published.desired == {
        ("default", "poet", "latest"): new,
        ("default", "poet", "prod"): old,
    }
    assert {version: facts.rows for version, facts in published.facts.items()} == {
        old: 3,
        new: 4,
    }, "a rank-2 LoRA may have a bias, which takes a page"


def test_nothing_is_read_again_until_something_changes(shelf: Shelf) -> None:
    shelf.publish(POET, 2)
    first = shelf.reader.read()
    assert shelf.reader.read() is first
    shelf.publish(CLERK, 2)
    assert set(shelf.reader.read().adapters) == {POET, CLERK}
    shelf.registry.delete(POET)
    assert set(shelf.reader.read().adapters) == {CLERK}


def test_a_publish_whose_publisher_died_before_saying_so_is_heard_of_in_the_end(
    shelf: Shelf,
) -> None:
    shelf.publish(POET, 2)
    shelf.reader.read()
    announced = shelf.store.get(layout.GENERATION).data
    shelf.publish(CLERK, 2)
    shelf.store.put(layout.GENERATION, announced)
    assert CLERK not in shelf.reader.read().adapters
    shelf.clock.advance(REREAD_S)
    assert CLERK in shelf.reader.read().adapters


def test_a_damaged_adapter_stays_as_it_was_and_hides_no_other(shelf: Shelf) -> None:
    kept = shelf.publish(POET, 2)
    shelf.reader.read()
    damaged = shelf.publish(POET, 3)
    shelf.store.put(layout.manifest(POET, damaged), b"{}")
    fresh = shelf.publish(CLERK, 1)
    published = shelf.reader.read()
    assert published.desired == {
        ("default", "poet", "latest"): kept,
        ("default", "clerk", "latest"): fresh,
    }
