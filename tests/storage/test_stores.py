"""Opening a store: what is refused, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore, StoredObject
from storage.probed_store import ProbedStore
from storage.s3_store import S3ObjectStore
from storage.stores import check_conditional_writes, open_store, open_store_when_used
from tests.storage.passing_store import PassingStore
from tests.storage.s3_server import S3Server


class _IgnoresIfNoneMatch(PassingStore):
    def put_if_absent(self, key: str, data: bytes) -> str:
        self.store.put(key, data)
        return self.store.get(key).etag


class _IgnoresIfMatch(PassingStore):
    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        self.store.put(key, data)
        return self.store.get(key).etag


class _CreatesOnIfMatch(PassingStore):
    """Checks the etag of what is there, but takes a missing object for a match."""

    def compare_and_swap(self, key: str, data: bytes, etag: str) -> str:
        if self.store.exists(key):
            return self.store.compare_and_swap(key, data, etag)
        return self.store.put_if_absent(key, data)


class _ForgetsWrites(PassingStore):
    def get(self, key: str) -> StoredObject:
        return StoredObject(b"something else", self.store.get(key).etag)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (_IgnoresIfNoneMatch, "If-None-Match"),
        (_IgnoresIfMatch, "If-Match"),
        (_CreatesOnIfMatch, "If-Match on a deleted object"),
        (_ForgetsWrites, "does not return what was written"),
    ],
)
def test_a_store_that_does_not_keep_conditional_writes_is_refused(
    store: ObjectStore, broken: type[PassingStore], told: str
) -> None:
    with pytest.raises(StoreUnavailableError, match=told):
        check_conditional_writes(broken(store))
    assert list(store.list("probes/")) == []


def test_opening_a_good_store_leaves_nothing_behind(settings: StorageSettings) -> None:
    store = open_store(settings)
    assert list(store.list("")) == []


def test_a_store_may_be_away_when_it_is_opened_and_is_proven_before_the_first_write(
    s3_api: S3Server, s3_settings: StorageSettings
) -> None:
    s3_api.stop()
    try:
        store = open_store_when_used(s3_settings)
        for use in (lambda: store.get("a"), lambda: store.put("a", b"1")):
            with pytest.raises(StoreUnavailableError):
                use()
    finally:
        s3_api.listen()
    store.put("a", b"1")
    assert store.get("a").data == b"1"
    assert [info.key for info in store.list("")] == ["a"]


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.put("a", b"1"),
        lambda store: store.put_if_absent("a", b"1"),
        lambda store: store.compare_and_swap("a", b"1", "etag"),
        lambda store: store.delete("a"),
    ],
)
def test_nothing_is_written_to_a_store_that_does_not_keep_conditional_writes(
    store: ObjectStore, write: Callable[[ObjectStore], object]
) -> None:
    store.put("a", b"0")
    late = ProbedStore(_IgnoresIfMatch(store), check_conditional_writes)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="If-Match"):
            write(late)
    assert late.get("a").data == b"0"


def test_the_setting_chooses_the_store(
    local_settings: StorageSettings, s3_settings: StorageSettings
) -> None:
    assert isinstance(open_store(local_settings), LocalObjectStore)
    assert isinstance(open_store(s3_settings), S3ObjectStore)


@pytest.mark.parametrize("registry", ["s3://", "s3:///prefix", "gs://bucket", "http://host/path"])
def test_an_unknown_kind_of_registry_is_refused_by_its_field(registry: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        open_store(StorageSettings(registry=registry))
    assert refused.value.param == "registry"
    assert registry in refused.value.message


def test_a_registry_directory_that_cannot_be_made_is_told_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailableError, match="cannot be opened") as refused:
        open_store(StorageSettings(registry=str(tmp_path / "file" / "registry")))
    assert str(tmp_path) not in refused.value.message
