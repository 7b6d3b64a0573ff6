"""Data sets in S3, brought to this machine as they are now and kept by their content."""

from __future__ import annotations

import os
from pathlib import Path

from storage.config import StorageSettings
from storage.errors import SpecificationError, StoreUnavailableError
from storage.identity import sha256_hex
from storage.object_store import ObjectNotFoundError
from storage.s3_store import S3ObjectStore

SCHEME = "s3://"


def fetch_data(url: str, settings: StorageSettings) -> Path:
    """The file of one object, in a folder named by the sha256 of its bytes: what is at the path never changes.

    Args:
        url: `s3://bucket/key`.
        settings: how S3 is reached, and where files are kept (`cache_dir`).

    Raises:
        SpecificationError: it is not such an address, or there is no such object.
        StoreUnavailableError: S3 cannot be reached, or the file cannot be kept.
    """
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket or not key:
        raise SpecificationError(f"{url} is not s3://bucket/key")
    try:
        data = S3ObjectStore(bucket, "", settings).get(key).data
    except ObjectNotFoundError:
        raise SpecificationError(f"there is no object {url}") from None
    except ValueError:
        raise SpecificationError(f"{url} has a key that is not a plain path") from None
    folder = settings.cache_dir.expanduser().absolute() / "data" / sha256_hex(data)
    path = folder / Path(key).name
    try:
        if not (path.is_file() and path.read_bytes() == data):
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f"~{os.getpid()}-{path.name}")
            written.write_bytes(data)
            written.replace(path)
    except OSError as error:
        raise StoreUnavailableError(
            f"{url} cannot be kept in storage.cache_dir: {error.strerror}"
        ) from error
    return path
