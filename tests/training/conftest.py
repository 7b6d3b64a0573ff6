"""The stores that a job's lasting things are tested on: a directory, and S3 over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.stores import open_store
from tests.storage.s3_server import S3Server, s3_server


@pytest.fixture
def local_settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(registry=str(tmp_path / "registry"))


@pytest.fixture(scope="session")
def s3_api() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_settings(s3_api: S3Server) -> StorageSettings:
    """Settings of a fresh, empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3_api.url, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    return StorageSettings(registry=f"s3://{bucket}/some/prefix", s3_endpoint_url=s3_api.url)


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
