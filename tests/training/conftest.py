"""The stores that a job's lasting things are tested on: a directory, and S3 over HTTP."""

from __future__ import annotations

import pytest

from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.stores import open_store


@pytest.fixture
def local(local_settings: StorageSettings) -> ObjectStore:
    return open_store(local_settings)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each store in turn: a test that asks for this runs once on a directory and once on S3."""
    settings: StorageSettings = request.getfixturevalue(f"{request.param}_settings")
    return open_store(settings)


@pytest.fixture
def undurable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut needs what `fsync` does; without it, tests of thousands of writes take seconds."""
    monkeypatch.setattr("os.fsync", lambda _: None)
