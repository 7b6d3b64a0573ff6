"""A key opens what it was made for, nothing else does, and what is kept of it opens nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.key_store import KeyStore
from cluster.keys import TOKEN_PREFIX, ApiKey, KeyRing, UnknownKeyError, new_key
from storage.config import StorageSettings
from storage.errors import InvalidRequestError
from storage.object_store import ObjectStore
from storage.stores import open_store
from tests.conftest import S3Endpoint


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Each kind of store in turn."""
    if request.param == "directory":
        return open_store(StorageSettings(registry=str(tmp_path / "registry")))
    endpoint: S3Endpoint = request.getfixturevalue("s3_endpoint")
    place = f"s3://{endpoint.bucket}/{tmp_path.name}"
    return open_store(StorageSettings(registry=place, s3_endpoint_url=endpoint.url))


def test_a_token_opens_as_its_own_key_alone() -> None:
    mine, other = (new_key(name, is_admin=False, created_s=1.0) for name in ("mine", "other"))
    ring = KeyRing([mine.key, other.key])
    assert ring.find(mine.token) == mine.key
    assert ring.find(other.token) == other.key
    swapped = other.token[: len(TOKEN_PREFIX) + 12] + mine.token[len(TOKEN_PREFIX) + 12 :]
    assert ring.find(swapped) is None


@given(st.data())
def test_no_text_but_the_token_opens(data: st.DataObject) -> None:
    made = new_key("team", is_admin=True, created_s=1.0)
    at = data.draw(st.integers(0, len(made.token) - 1))
    letter = data.draw(st.characters(codec="ascii"))
    changed = made.token[:at] + letter + made.token[at + 1 :]
    found = KeyRing([made.key]).find(changed)
    assert (found is not None) == (changed == made.token)


def test_what_is_kept_does_not_have_the_secret() -> None:
    made = new_key("team", is_admin=True, created_s=1.0, note="laptop")
    kept = made.key.model_dump_json()
    assert made.token not in kept
    assert made.token.rpartition("-")[2] not in kept
    again = new_key("team", is_admin=True, created_s=1.0)
    assert again.key.salt != made.key.salt and again.token != made.token


def test_a_key_for_no_tenant_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not a valid name"):
        new_key("../other", is_admin=False, created_s=1.0)


def test_keys_are_kept_listed_and_revoked(store: ObjectStore) -> None:
    keys = KeyStore(store)
    assert keys.keys() == [] and len(keys.ring()) == 0
    second = new_key("second", is_admin=False, created_s=2.0)
    first = new_key("first", is_admin=True, created_s=1.0)
    keys.add(second.key)
    keys.add(first.key)
    elsewhere = KeyStore(store)
    assert elsewhere.keys() == [first.key, second.key]
    assert elsewhere.ring().find(second.token) == second.key
    keys.revoke(second.key.key_id)
    assert elsewhere.ring().find(second.token) is None
    assert elsewhere.ring().find(first.token) == first.key
    for unknown in (second.key.key_id, "../adapters", ""):
        with pytest.raises(UnknownKeyError):
            keys.revoke(unknown)


def test_an_object_that_is_no_key_hides_none(tmp_path: Path) -> None:
    """Somebody copied a record by hand, to a name that no store of ours would write."""
    keys = KeyStore(open_store(StorageSettings(registry=str(tmp_path))))
    good = new_key("team", is_admin=False, created_s=1.0)
    keys.add(good.key)
    (tmp_path / "keys" / "my copy.json").write_text(good.key.model_dump_json())
    assert keys.keys() == [good.key]


def test_a_damaged_key_opens_nothing_and_hides_no_other(store: ObjectStore) -> None:
    keys = KeyStore(store)
    good, bad = (new_key("team", is_admin=False, created_s=1.0) for _ in range(2))
    keys.add(good.key)
    store.put(f"keys/{bad.key.key_id}.json", b"{}")
    borrowed = ApiKey(**{**good.key.model_dump(), "is_admin": True})
    store.put("keys/000000000000.json", borrowed.model_dump_json().encode())
    assert keys.keys() == [good.key]
