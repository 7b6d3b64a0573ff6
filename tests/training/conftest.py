"""The stores that a job's lasting things are tested on: a directory, and S3 over HTTP."""

from __future__ import annotations

import uuid
from pathlib import Path

import boto3
import pytest

from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.stores import open_store
from tests.conftest import S3Endpoint


@pytest.fixture
def local_settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(registry=str(tmp_path / "registry"))


@pytest.fixture
def s3_settings(s3_endpoint: S3Endpoint) -> StorageSettings:
    """Settings of a fresh, empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3_endpoint.url, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    return StorageSettings(registry=f"s3://{bucket}/some/prefix", s3_endpoint_url=s3_endpoint.url)


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
