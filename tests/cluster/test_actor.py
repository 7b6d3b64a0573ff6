"""What the actor does beside the manager, without Ray: follow a real registry, judge what replicas call corrupt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.actor import PlacementActor, PlacementSpec
from cluster.config import ClusterSettings
from cluster.table import ReaderReport, ReplicaReport
from cluster.view import TableView
from storage.config import StorageSettings
from storage.errors import FailedVersion
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.manifest import FileEntry, ManifestContent, Provenance
from storage.registry import Registry
from storage.stores import open_store

POET = AdapterName("default", "poet")
KEY = ("default", "poet", "latest")


class World:
    """An actor of fast habits over a registry on disk."""

    def __init__(self, directory: Path) -> None:
        storage = StorageSettings(registry=str(directory / "registry"))
        self.directory = directory / "registry"
        self.registry = Registry(open_store(storage))
        cluster = ClusterSettings(heartbeat_s=0.02, tick_s=0.05, registry_poll_s=0.02)
        self.actor = PlacementActor(
            PlacementSpec(app_name="test", base_id="base", cluster=cluster, storage=storage)
        )
        self.view = TableView(time.monotonic)
        self.failed: tuple[FailedVersion, ...] = ()

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
        """A replica and a reader call until it is so."""
        deadline_s = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < deadline_s
            self.actor.heartbeat(ReplicaReport("a", rows=16, num_bytes=1000, failed=self.failed))
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
    world.failed = (FailedVersion(new, "adapter_corrupt", "a file has other bytes"),)
    world.until(lambda: world.view.table.serving == {KEY: old})
    world.until(lambda: new in world.registry.quarantined())
    world.failed = ()
    world.publish("two")  # the same again, which repairs it
    world.until(lambda: world.view.table.serving == {KEY: new})


def test_a_version_that_is_whole_is_held_against_the_replica_alone(world: World) -> None:
    world.publish("one")
    new = world.publish("two")
    world.failed = (FailedVersion(new, "adapter_corrupt", "a file has other bytes"),)
    world.until(lambda: new in world.actor.state().failed_on and not world.actor.state().failed)
    world.until(lambda: world.view.table.serving == {KEY: new})
    assert world.registry.quarantined() == {}


def test_a_replica_may_leave_once_its_adapters_are_near_another(world: World) -> None:
    world.publish("one")
    world.actor.poll(ReaderReport())
    assert not world.actor.prepare_to_shrink(), "there is but one"
