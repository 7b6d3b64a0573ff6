"""The stores that every promise of storage is tested on: a directory, and S3 over HTTP."""

from __future__ import annotations

import pytest

from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store


@pytest.fixture(params=["local", "s3"])
def settings(request: pytest.FixtureRequest) -> StorageSettings:
    """Each store in turn: a test that asks for this runs once on a directory and once on S3."""
    chosen: StorageSettings = request.getfixturevalue(f"{request.param}_settings")
    return chosen


@pytest.fixture
def store(settings: StorageSettings) -> ObjectStore:
    return open_store(settings)


@pytest.fixture
def registry(store: ObjectStore) -> Registry:
    return Registry(store)


@pytest.fixture
def undurable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut needs what `fsync` does; without it, tests of thousands of writes take seconds."""
    monkeypatch.setattr("os.fsync", lambda _: None)
