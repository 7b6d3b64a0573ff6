"""Specifications that lie in the registry's store, for jobs that cannot see their author's disk.

A specification and its data lie in one folder of the store; as on a disk, relative paths are relative to that folder.
"""

from __future__ import annotations

from pathlib import Path

from storage.errors import SpecificationError
from storage.object_store import ObjectNotFoundError, ObjectStore

STORED = "store:"
"""`store:jobs/2024/spec.yaml` is the object `jobs/2024/spec.yaml`, where a path would be."""


def fetch_spec(store: ObjectStore, key: str, directory: Path) -> Path:
    """Copy a specification's folder to a directory on disk; returns the specification's path there.

    Raises:
        SpecificationError: there is no such object, or it lies in no folder.
    """
    folder, slash, name = key.rpartition("/")
    if not slash:
        raise SpecificationError(
            f"{STORED}{key}: a stored specification lies in a folder of its own"
        )
    for found in store.list(f"{folder}/"):
        path = directory / found.key.removeprefix(f"{folder}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(store.get(found.key).data)
        except ObjectNotFoundError:
            continue  # deleted since it was listed
    if not (directory / name).is_file():
        raise SpecificationError(f"{STORED}{key}: there is no such specification in the store")
    return directory / name
