"""What the registry promises one caller at a time, on both stores."""

from __future__ import annotations

import pytest

from storage import layout
from storage.errors import (
    AdapterCorruptError,
    AmbiguousModelError,
    InvalidRequestError,
    UnknownModelError,
)
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.manifest import ManifestContent, Provenance
from storage.object_store import ObjectStore
from storage.registry import Registry
from tests.storage.versions import NAME, content_of, files_of, publish, version_of


def test_a_published_version_is_found_by_every_name_it_has(registry: Registry) -> None:
    version = publish(registry, "one")
    assert version == version_of("one")
    for selector in ("latest", version, f"sha256:{version}", version[:8], f"sha256:{version[:20]}"):
        assert registry.resolve(NAME, selector) == version
    assert registry.resolve(NAME) == version


def test_a_version_alone_leads_to_its_content_and_files(registry: Registry) -> None:
    version = publish(registry, "one")
    content = registry.content(version)
    assert content == content_of(files_of("one")) == registry.manifest(NAME, version).content
    found = {path: registry.read_file(entry) for path, entry in content.files.items()}
    assert found == files_of("one")


def test_the_same_content_again_is_the_same_version_with_its_first_provenance(
    registry: Registry,
) -> None:
    version = publish(registry, "one", created_s=1.0)
    assert publish(registry, "one", created_s=2.0) == version
    assert registry.manifest(NAME, version).provenance.created_s == 1.0
    assert len(registry.versions(NAME)) == 1
    assert registry.aliases(NAME)["latest"].generation == 1


def test_a_new_version_takes_the_alias_and_the_old_one_stays(registry: Registry) -> None:
    old, new = publish(registry, "old", created_s=1.0), publish(registry, "new", created_s=2.0)
    assert registry.resolve(NAME) == new
    assert registry.resolve(NAME, old) == old
    assert [manifest.version for manifest in registry.versions(NAME)] == [old, new]


def test_rolling_back_is_moving_the_alias(registry: Registry) -> None:
    old = publish(registry, "old")
    publish(registry, "new")
    record = registry.move_alias(NAME, "latest", old)
    assert (record.version, record.generation) == (old, 3)
    assert registry.resolve(NAME) == old
    assert registry.move_alias(NAME, "latest", old) == record, "moving it nowhere is no move"


def test_publishing_without_an_alias_moves_none(registry: Registry) -> None:
    old = publish(registry, "old")
    new = publish(registry, "new", alias=None)
    assert registry.resolve(NAME) == old
    registry.move_alias(NAME, "prod", new)
    assert {alias: record.version for alias, record in registry.aliases(NAME).items()} == {
        "latest": old,
        "prod": new,
    }


def test_an_alias_that_looks_like_a_version_wins_unless_the_version_is_asked_for(
    registry: Registry,
) -> None:
    one, two = publish(registry, "one"), publish(registry, "two")
    registry.move_alias(NAME, one[:10], two)
    assert registry.resolve(NAME, one[:10]) == two
    assert registry.resolve(NAME, f"sha256:{one[:10]}") == one


def test_an_ambiguous_start_of_a_version_is_refused(registry: Registry, store: ObjectStore) -> None:
    version = publish(registry, "one")
    # Nobody can make two contents with the same first 8 digits; a stray manifest does as well.
    other = AdapterVersion(version[:12] + "0" * 52)
    store.put(layout.manifest(NAME, other), b"{}")
    with pytest.raises(AmbiguousModelError, match=version[:8]):
        registry.resolve(NAME, version[:8])
    assert registry.resolve(NAME, version) == version
    assert registry.resolve(NAME, version[:13]) == version


def test_an_unknown_selector_is_told_with_its_adapter(registry: Registry) -> None:
    publish(registry, "one")
    for selector in ("prod", "deadbeef", "sha256:deadbeef", "0" * 64, "", "../latest", "La Test"):
        with pytest.raises(UnknownModelError) as unknown:
            registry.resolve(NAME, selector)
        assert unknown.value.param == "model"
        assert "pirate" in unknown.value.message and repr(selector) in unknown.value.message


def test_fewer_than_eight_digits_are_no_version(registry: Registry) -> None:
    version = publish(registry, "one")
    with pytest.raises(UnknownModelError):
        registry.resolve(NAME, version[:7])


def test_another_tenants_adapter_is_as_unknown_as_one_that_never_was(registry: Registry) -> None:
    publish(registry, "one")
    messages = []
    for name in (AdapterName("other", "pirate"), AdapterName("other", "never")):
        with pytest.raises(UnknownModelError) as unknown:
            registry.resolve(name)
        messages.append(unknown.value.message.replace(name.name, "NAME"))
    assert messages[0] == messages[1]


def test_names_are_listed_by_tenant(registry: Registry) -> None:
    names = [AdapterName(*pair) for pair in (("a", "x"), ("a", "y-1"), ("ab", "x"), ("b", "z"))]
    for name in names:
        publish(registry, "one", name=name)
    assert list(registry.list("a")) == names[:2]
    assert list(registry.list("ab")) == names[2:3]
    assert list(registry.list("none")) == []
    assert list(registry.list()) == names


def test_stray_objects_are_nobodys_adapter(registry: Registry, store: ObjectStore) -> None:
    version = publish(registry, "one")
    for key in (
        "adapters/note",
        "adapters/team/note",
        "adapters/Team/X/versions/" + version + ".json",
        "adapters/team/pirate/versions/note.json",
        "adapters/team/pirate/versions/" + version + ".json.bak",
        "adapters/team/pirate/aliases/UPPER.json",
        "adapters/team/other/aliases/latest.json",
    ):
        store.put(key, b"?")
    assert list(registry.list()) == [NAME]
    assert [manifest.version for manifest in registry.versions(NAME)] == [version]
    assert list(registry.aliases(NAME)) == ["latest"]


def test_a_deleted_adapter_is_gone_under_every_name(registry: Registry) -> None:
    other = AdapterName("team", "other")
    versions = [publish(registry, text) for text in ("one", "two")]
    publish(registry, "one", name=other)
    registry.move_alias(NAME, "prod", versions[0])
    registry.delete(NAME)
    for selector in ("latest", "prod", *versions, versions[0][:8]):
        with pytest.raises(UnknownModelError):
            registry.resolve(NAME, selector)
    with pytest.raises(UnknownModelError):
        registry.manifest(NAME, versions[0])
    with pytest.raises(UnknownModelError):
        registry.move_alias(NAME, "latest", versions[0])
    assert registry.versions(NAME) == [] and registry.aliases(NAME) == {}
    assert list(registry.list("team")) == [other]
    assert registry.resolve(other) == versions[0]
    with pytest.raises(UnknownModelError):
        registry.delete(NAME)


def test_a_replica_can_finish_with_a_deleted_version(registry: Registry) -> None:
    version = publish(registry, "one")
    registry.delete(NAME)
    assert registry.content(version) == content_of(files_of("one"))


def test_publishing_after_a_delete_brings_back_only_what_is_published(registry: Registry) -> None:
    one, two = publish(registry, "one"), publish(registry, "two")
    registry.move_alias(NAME, "prod", one)
    registry.delete(NAME)
    assert publish(registry, "one") == one
    assert registry.resolve(NAME) == one
    assert [manifest.version for manifest in registry.versions(NAME)] == [one]
    assert list(registry.aliases(NAME)) == ["latest"], (
        "prod stays deleted though its version is back"
    )
    assert registry.aliases(NAME)["latest"].generation == 3
    with pytest.raises(UnknownModelError):
        registry.resolve(NAME, two)
    registry.move_alias(NAME, "prod", one)
    assert registry.resolve(NAME, "prod") == one


def test_the_generation_grows_with_every_change_and_only_then(registry: Registry) -> None:
    assert registry.generation() == 0
    seen = [0]

    def grown() -> bool:
        seen.append(registry.generation())
        return seen[-1] > seen[-2]

    one = publish(registry, "one")
    assert grown()
    publish(registry, "two")
    assert grown()
    registry.move_alias(NAME, "prod", one)
    assert grown()
    registry.resolve(NAME)
    registry.list()
    registry.aliases(NAME)
    assert not grown()
    registry.delete(NAME)
    assert grown()


def test_content_that_does_not_describe_the_files_is_not_published(
    registry: Registry, store: ObjectStore
) -> None:
    with pytest.raises(ValueError):
        registry.publish(
            NAME,
            files_of("one"),
            content_of(files_of("two")),
            provenance=Provenance(created_s=0),
        )
    assert list(store.list("")) == []


def test_an_invalid_alias_is_refused_before_anything_is_written(
    registry: Registry, store: ObjectStore
) -> None:
    for alias in ("", "Up", "a/b", "../x", "a b", "-a"):
        with pytest.raises(InvalidRequestError) as refused:
            publish(registry, "one", alias=alias)
        assert refused.value.param == "alias"
    assert list(store.list("")) == []


def test_a_damaged_file_is_never_returned(registry: Registry, store: ObjectStore) -> None:
    version = publish(registry, "one")
    entry = registry.content(version).files["adapter_model.safetensors"]
    for damage in (b"onf", b"", b"one."):
        store.put(layout.blob(entry.sha256), damage)
        with pytest.raises(AdapterCorruptError, match=entry.sha256):
            registry.read_file(entry)
    store.delete(layout.blob(entry.sha256))
    with pytest.raises(AdapterCorruptError, match="missing"):
        registry.read_file(entry)
    publish(registry, "one")
    assert registry.read_file(entry) == b"one", "publishing again repairs it"


def test_damaged_content_is_never_returned(registry: Registry, store: ObjectStore) -> None:
    one, two = publish(registry, "one"), publish(registry, "two")
    store.put(layout.blob(one), store.get(layout.blob(two)).data)
    with pytest.raises(AdapterCorruptError, match=one):
        registry.content(one)
    with pytest.raises(UnknownModelError):
        registry.content(version_of("never published"))


def test_a_manifest_under_another_versions_name_is_never_returned(
    registry: Registry, store: ObjectStore
) -> None:
    one, two = publish(registry, "one"), publish(registry, "two")
    store.put(layout.manifest(NAME, one), store.get(layout.manifest(NAME, two)).data)
    with pytest.raises(AdapterCorruptError, match=one):
        registry.manifest(NAME, one)
    with pytest.raises(AdapterCorruptError):
        publish(registry, "one")


def test_a_damaged_alias_is_told(registry: Registry, store: ObjectStore) -> None:
    publish(registry, "one")
    for damage in (b"", b"{}", b"\xff", b'{"version": "x", "generation": 1}'):
        store.put(layout.alias(NAME, "latest"), damage)
        with pytest.raises(AdapterCorruptError, match="latest"):
            registry.resolve(NAME)
        with pytest.raises(AdapterCorruptError):
            publish(registry, "two")


def test_content_that_names_a_path_is_no_content() -> None:
    described = content_of(files_of("one")).model_dump(mode="json")
    described["files"]["../escape"] = described["files"].pop("adapter_config.json")
    with pytest.raises(ValueError):
        ManifestContent.model_validate(described)


def test_blobs_lie_under_their_own_digest(registry: Registry, store: ObjectStore) -> None:
    version = publish(registry, "one")
    blobs = {entry.key.rpartition("/")[2]: entry.key for entry in store.list("blobs/sha256/")}
    assert set(blobs) == {version, *(sha256_hex(data) for data in files_of("one").values())}
    for digest, key in blobs.items():
        assert sha256_hex(store.get(key).data) == digest
