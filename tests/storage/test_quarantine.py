"""A damaged version is served to nobody, the one before it is, and publishing it again makes it good."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import pytest

from storage import layout
from storage.errors import (
    AdapterCorruptError,
    InvalidRequestError,
    StoreUnavailableError,
    UnknownModelError,
)
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore
from storage.quarantine import is_undamaged
from storage.registry import Registry
from storage.verification import verify
from tests.storage.passing_store import InterruptingStore
from tests.storage.versions import NAME, assert_whole, files_of, publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")
OTHER = AdapterName("team", "other")


def damage(store: ObjectStore, text: str) -> None:
    store.put(layout.blob(sha256_hex(text.encode())), text.encode() + b"!")


def test_an_alias_goes_back_to_the_newest_good_version(store: ObjectStore) -> None:
    registry = Registry(store)
    versions = [publish(registry, text) for text in ("one", "two", "three")]
    for text, version, expected in (
        ("three", versions[2], versions[1]),
        ("two", versions[1], versions[0]),
    ):
        damage(store, text)
        assert registry.quarantine(version, f"{text} is damaged")
        assert registry.resolve(NAME) == expected
        for selector in (version, version[:10]):
            with pytest.raises(AdapterCorruptError, match=f"{text} is damaged"):
                registry.resolve(NAME, selector)
        with pytest.raises(AdapterCorruptError):
            registry.move_alias(NAME, "prod", version)
    assert registry.quarantined() == {
        versions[2]: "three is damaged",
        versions[1]: "two is damaged",
    }
    damage(store, "one")
    assert registry.quarantine(versions[0], "one is damaged")
    with pytest.raises(AdapterCorruptError, match="three is damaged"):
        registry.resolve(NAME)
    publish(registry, "three", alias=None)
    assert registry.resolve(NAME) == versions[2], "the alias was never moved"
    assert set(registry.quarantined()) == set(versions[:2])


def test_a_version_that_is_whole_is_not_quarantined(store: ObjectStore) -> None:
    registry = Registry(store)
    version = publish(registry, "one")
    assert not registry.quarantine(version, "a replica's own disk was at fault")
    assert registry.quarantined() == {} and registry.resolve(NAME) == version


def test_going_back_passes_over_what_is_deleted_or_damaged(store: ObjectStore) -> None:
    registry = Registry(store)
    versions = [publish(registry, text) for text in ("one", "two", "three", "four")]
    registry.delete_version(NAME, versions[2])
    damage(store, "two")
    registry.quarantine(versions[1], "damaged")
    assert registry.roll_back(NAME, "latest").version == versions[0]
    with pytest.raises(UnknownModelError):
        registry.roll_back(NAME, "prod")
    registry.move_alias(NAME, "prod", versions[0])
    with pytest.raises(InvalidRequestError, match="no earlier version"):
        registry.roll_back(NAME, "prod")


def test_a_publish_during_a_quarantine_leaves_a_good_version_out_of_it(tmp_path: Path) -> None:
    """At every point of a quarantine of damaged files, somebody may publish them again."""
    for at in itertools.count():
        store = LocalObjectStore(tmp_path / str(at))
        registry = Registry(store)
        version = publish(registry, "one")
        damage(store, "one")
        interrupting = InterruptingStore(store, at, lambda there=registry: publish(there, "one"))
        Registry(interrupting).quarantine(version, "damaged")
        if not interrupting.has_happened:
            assert at > 5, "nothing was interrupted: this test proved nothing"
            return
        if is_undamaged(store, version):
            assert registry.quarantined() == {}, f"a good version is in quarantine ({at})"


def test_an_outage_during_a_quarantine_leaves_a_whole_version_out_of_it(
    store: ObjectStore,
) -> None:
    """The same as being killed: at some point nothing is written any more."""
    registry = Registry(store)
    version = publish(registry, "one")

    def go_away() -> None:
        raise StoreUnavailableError("gone")

    for at in itertools.count():
        failing = InterruptingStore(store, at, go_away)
        with suppress(StoreUnavailableError):
            Registry(failing).quarantine(version, "a replica's own disk was at fault")
        assert registry.quarantined() == {}
        if not failing.has_happened:
            assert at > 3, "nothing failed: this test proved nothing"
            return


def test_a_version_that_does_not_exist_is_not_quarantined(store: ObjectStore) -> None:
    registry = Registry(store)
    publish(registry, "one")
    before = [each.key for each in store.list("")]
    with pytest.raises(UnknownModelError):
        registry.quarantine(version_of("never published"), "damaged")
    assert [each.key for each in store.list("")] == before and registry.quarantined() == {}


def test_verification_names_what_is_damaged_and_what_is_whole_again(store: ObjectStore) -> None:
    registry = Registry(store)
    for text in ("one", "two", "three"):
        publish(registry, text)
    publish(registry, "two", name=OTHER)
    publish(registry, "four", name=OTHER)
    assert verify(registry, store).damaged == ()
    damage(store, "two")
    store.delete(layout.blob(version_of("three")))
    store.put(layout.blob(sha256_hex(b"four")), b"four" + b"?" * 10)
    found = verify(registry, store)
    assert {each.version: (each.names, each.is_quarantined) for each in found.damaged} == {
        version_of("two"): ((OTHER, NAME), True),
        version_of("three"): ((NAME,), True),
        version_of("four"): ((OTHER,), True),
    }
    assert (found.versions, found.files) == (4, 4)
    of_name = {each.version for each in verify(registry, store, NAME).damaged}
    assert of_name == {version_of("two"), version_of("three")}
    for data in files_of("two").values():
        store.put(layout.blob(sha256_hex(data)), data)
    assert verify(registry, store).lifted == (version_of("two"),)
    assert registry.quarantined().keys() == {version_of("three"), version_of("four")}
    with pytest.raises(UnknownModelError):
        verify(registry, store, AdapterName("team", "nobody"))


def test_a_damaged_manifest_is_written_again_from_what_is_left(store: ObjectStore) -> None:
    registry = Registry(store)
    version = publish(registry, "one")
    store.put(layout.manifest(NAME, version), b"{}")
    (damage,) = verify(registry, store).damaged
    assert (damage.version, damage.is_quarantined) == (version, False)
    found = verify(registry, store, repair=True)
    assert found.repaired == ((NAME, version),) and found.damaged == ()
    assert_whole(registry, NAME, version)
    assert registry.manifest(NAME, version).provenance.warnings
    assert registry.list()[NAME].versions[0].version == AdapterVersion(version)
