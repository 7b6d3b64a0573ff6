"""What the actor does beside the manager, without Ray: follow a real registry, judge what replicas call corrupt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.actor import PlacementActor, PlacementSpec
from cluster.config import ClusterSettings
from cluster.manager import PlacementManager
from cluster.published import Published, PublishedReader
from cluster.registry_word import RegistryWord
from cluster.table import ReplicaOrders, ReplicaReport
from cluster.view import TableView
from storage.config import StorageSettings
from storage.errors import FailedVersion, StoreUnavailableError, UnknownModelError
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from storage.stores import open_store

POET = AdapterName("default", "poet")
KEY = ("default", "poet", "latest")


def corrupt(*versions: AdapterVersion) -> tuple[FailedVersion, ...]:
    return tuple(
        FailedVersion(version, "adapter_corrupt", "a file has other bytes") for version in versions
    )


class World:
    """An actor of fast habits over a registry on disk."""

    def __init__(self, directory: Path) -> None:
        storage = StorageSettings(registry=str(directory / "registry"))
        self.directory = directory / "registry"
        self.registry = Registry(open_store(storage))
        cluster = ClusterSettings(
            heartbeat_s=0.02, missed_heartbeats=15, tick_s=0.05, registry_poll_s=0.02
        )
        self.actor = PlacementActor(
            PlacementSpec(app_name="test", base_id="base", cluster=cluster, storage=storage)
        )
        self.view = TableView(time.monotonic)
        self.reports: dict[str, ReplicaReport] = {}
        self.orders: dict[str, ReplicaOrders | None] = {}
        self.tell("a")

    def tell(self, replica_id: str, **told: Any) -> None:
        """What the replica reports from now on."""
        before = self.reports.get(replica_id, ReplicaReport(replica_id, rows=16, num_bytes=1000))
        self.reports[replica_id] = replace(before, **told)

    def publish(self, text: str) -> AdapterVersion:
        data = text.encode()
        content = ManifestContent(
            files={"f": FileEntry(sha256=sha256_hex(data), num_bytes=len(data))},
            family="lora",
            ranks={"q": 2},
            dtype="f32",
        )
        return self.registry.publish(
            POET, {"f": data}, content, provenance=Provenance(created_s=1.0)
        )

    def damage(self, text: str) -> None:
        (blob,) = self.directory.rglob(sha256_hex(text.encode()))
        blob.write_bytes(b"x" + text.encode()[1:])

    def until(self, is_so: Callable[[], bool]) -> None:
        """Every replica and a reader call until it is so."""
        deadline_s = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < deadline_s
            for replica_id, report in self.reports.items():
                self.orders[replica_id] = self.actor.heartbeat(report)
            self.view.offer(self.actor.poll(self.view.take_report()))
            time.sleep(0.01)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.actor.stop()


def test_what_is_published_and_asked_for_is_served_and_held(world: World) -> None:
    version = world.publish("one")
    world.actor.nudge()
    world.until(lambda: world.view.table.serving == {KEY: version})
    world.view.record(version, 100.0)
    world.until(lambda: world.view.table.holders.get(version) == ("a",))
    assert world.actor.state().registry_error is None


def test_a_version_whose_stored_bytes_are_damaged_is_quarantined_for_everybody(
    world: World,
) -> None:
    old, new = world.publish("one"), world.publish("two")
    world.until(lambda: world.view.table.serving == {KEY: new})
    world.damage("two")
    world.tell("a", failed=corrupt(new))
    world.until(lambda: world.view.table.serving == {KEY: old})
    world.until(lambda: new in world.registry.quarantined())
    world.tell("a", failed=())
    world.publish("two")  # the same again, which repairs it
    world.until(lambda: world.view.table.serving == {KEY: new})


def test_a_version_that_is_whole_is_held_against_the_replica_alone(world: World) -> None:
    world.publish("one")
    new = world.publish("two")
    world.tell("a", failed=corrupt(new))
    world.tell("b")
    world.until(lambda: new in world.actor.state().failed_on and not world.actor.state().failed)
    world.until(lambda: world.view.table.serving == {KEY: new})
    assert world.registry.quarantined() == {}


def test_a_replica_may_leave_once_its_adapters_are_near_another(world: World) -> None:
    version = world.publish("one")
    world.until(lambda: world.view.table.serving == {KEY: version})
    world.tell("a", device=(version,))
    world.view.record(version, 100.0)
    world.until(lambda: world.view.table.holders.get(version) == ("a",))
    assert not world.actor.prepare_to_shrink(), "there is but one replica"
    world.tell("b")
    world.until(lambda: not world.actor.prepare_to_shrink() and near(world, "b") == (version,))
    world.tell("b", disk=(version,))
    world.until(world.actor.prepare_to_shrink)


def test_a_suspect_that_cannot_be_read_keeps_no_other_version_from_being_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quarantine(self: Registry, version: AdapterVersion, reason: str) -> bool:
        raise StoreUnavailableError("a part of the store is away")

    monkeypatch.setattr(Registry, "quarantine", quarantine)
    world.tell("a", failed=corrupt(world.publish("one")))
    world.until(lambda: world.actor.state().registry_error == "a part of the store is away")
    new = world.publish("two")
    world.until(lambda: world.view.table.serving == {KEY: new})


def test_the_registry_is_read_between_one_suspect_and_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspects = [world.publish(f"suspect {index}") for index in range(5)]
    seen: list[str] = []
    read, quarantine = PublishedReader.read, Registry.quarantine

    def noted_read(self: PublishedReader) -> Published:
        seen.append("registry")
        return read(self)

    def noted_quarantine(self: Registry, version: AdapterVersion, reason: str) -> bool:
        seen.append("suspect")
        return quarantine(self, version, reason)

    monkeypatch.setattr(PublishedReader, "read", noted_read)
    monkeypatch.setattr(Registry, "quarantine", noted_quarantine)
    world.tell("a", failed=corrupt(*suspects))
    world.until(lambda: seen.count("suspect") == len(suspects))
    assert ("suspect", "suspect") not in pairwise(seen)


def test_a_suspect_deleted_meanwhile_is_asked_for_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AdapterVersion] = []
    gone, whole = sorted([world.publish("one"), world.publish("two")])

    def quarantine(self: Registry, version: AdapterVersion, reason: str) -> bool:
        asked.append(version)
        if version == gone:
            raise UnknownModelError(version)
        return False

    monkeypatch.setattr(Registry, "quarantine", quarantine)
    world.tell("a", failed=corrupt(gone, whole))
    world.until(lambda: whole in asked)
    assert asked == [gone, whole]


def test_an_error_while_the_registrys_word_is_taken_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PlacementManager, word: RegistryWord) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(PlacementManager, "set_registry", fail)
        version = world.publish("one")
        world.actor.nudge()
        world.until(lambda: world.actor.state().registry_error == "RuntimeError")
    world.until(lambda: world.view.table.serving == {KEY: version})


def near(world: World, replica_id: str) -> tuple[AdapterVersion, ...]:
    orders = world.orders.get(replica_id)
    return orders.near if orders is not None else ()
