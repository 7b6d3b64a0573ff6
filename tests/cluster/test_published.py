"""What is published is read when it changed, and one adapter's damage does not hide the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.published import Published, PublishedReader
from storage import layout
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.index_reader import COMPARE_S
from storage.local_store import LocalObjectStore
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from tests.cluster.clocks import ManualClock

POET, CLERK = AdapterName("default", "poet"), AdapterName("default", "clerk")


class Shelf:
    """A real registry on disk and a reader of it."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock()
        self.store = LocalObjectStore(directory)
        self.registry = Registry(self.store, self.clock)
        self.reader = PublishedReader(self.registry)

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
    assert published.aliases == {
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
    shelf.clock.advance(COMPARE_S)
    assert CLERK in shelf.reader.read().adapters


def test_a_version_that_cannot_be_read_is_passed_over_and_hides_no_other(shelf: Shelf) -> None:
    kept = shelf.publish(POET, 2)
    damaged = shelf.publish(POET, 3)
    fresh = shelf.publish(CLERK, 1)
    shelf.store.put(layout.manifest(POET, damaged), b"{}")
    for each in list(shelf.store.list(layout.INDEX)):
        shelf.store.delete(each.key)
    published = shelf.reader.read()
    assert published.aliases == {
        ("default", "poet", "latest"): damaged,
        ("default", "clerk", "latest"): fresh,
    }
    assert published.history == {("default", "poet", "latest"): (kept,)}
    assert published.facts.keys() == {kept, fresh}


def test_a_damaged_alias_stays_what_it_was_read_as(shelf: Shelf) -> None:
    kept = shelf.publish(POET, 2)
    shelf.reader.read()
    shelf.store.put(layout.alias(POET, "latest"), b"{}")
    fresh = shelf.publish(CLERK, 1)
    shelf.clock.advance(COMPARE_S)
    assert shelf.reader.read().aliases == {
        ("default", "poet", "latest"): kept,
        ("default", "clerk", "latest"): fresh,
    }


def test_a_quarantine_is_told_beside_what_its_alias_means_and_meant_until_it_is_lifted(
    shelf: Shelf,
) -> None:
    good, bad = shelf.publish(POET, 2), shelf.publish(POET, 3)
    latest = ("default", "poet", "latest")
    assert shelf.reader.read().quarantined == {}
    damage(shelf, bad)
    assert shelf.registry.quarantine(bad, "a byte is wrong")
    published = shelf.reader.read()
    assert published.quarantined == {bad: "a byte is wrong"}
    assert published.aliases == {latest: bad}
    assert published.history == {latest: (good,)}
    assert shelf.publish(POET, 3) == bad
    assert shelf.reader.read().quarantined == {}


def test_a_version_of_two_names_is_known_until_both_are_gone(shelf: Shelf) -> None:
    version = shelf.publish(POET, 2)
    content, files = shelf.registry.content(version), {"f": f"{POET} 2".encode()}
    shelf.registry.publish(CLERK, files, content, provenance=Provenance(created_s=0.0))
    assert shelf.reader.read().facts.keys() == {version}
    shelf.registry.delete(POET)
    assert shelf.reader.read().facts.keys() == {version}
    shelf.registry.delete(CLERK)
    published = shelf.reader.read()
    assert published.facts == {} == published.aliases == published.adapters


def test_what_changed_is_followed_to_what_a_fresh_reader_finds(shelf: Shelf) -> None:
    """Every step's maps, patched from the step before, are those made from nothing."""
    names = [AdapterName("default", f"a{number}") for number in range(5)]
    for step in range(12):
        name = names[step * 7 % 5]
        version = shelf.publish(name, 1 + step % 3)
        if step % 3 == 0:
            shelf.registry.pin(name, step + 1)
        if step % 4 == 1:
            shelf.registry.delete(name)
        if step % 4 == 3:
            damage(shelf, version)
            shelf.registry.quarantine(version, "damaged")
        followed = shelf.reader.read()
        fresh = PublishedReader(Registry(shelf.store, shelf.clock)).read()
        assert followed == fresh
        made = Published(followed.generation, followed.adapters, followed.quarantined)
        assert followed.facts == made.facts
        assert list(followed.adapters) == sorted(followed.adapters)


def damage(shelf: Shelf, version: AdapterVersion) -> None:
    (entry,) = shelf.registry.content(version).files.values()
    shelf.store.put(layout.blob(entry.sha256), b"?")
