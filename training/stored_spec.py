"""Specifications that lie in the registry's store, for jobs that cannot see their author's disk.

A specification and its data lie in one folder of the store; as on a disk, relative paths are relative to that folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from storage.errors import SpecificationError
from storage.object_store import ObjectNotFoundError, ObjectStore
from training.spec import TrainingSpec

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


def store_spec(store: ObjectStore, spec: TrainingSpec, job_id: str) -> str:
    """Put a specification and its data into the folder of a job; returns the key to submit.

    The data is as it is now: what happens to the files later does not reach the job. Storing again changes nothing
    that a job of the same id, specification and data reads.
    """
    folder = f"jobs/{job_id}"
    values = spec.model_dump(mode="json", exclude_none=True)
    for number, (adapter, written) in enumerate(
        zip(spec.adapters, values["adapters"], strict=True)
    ):
        written["data"] = _put(store, adapter.data, folder, f"{number}.jsonl")
        if adapter.evaluation is not None and adapter.evaluation.data is not None:
            name = f"{number}.evaluation.jsonl"
            written["evaluation"]["data"] = _put(store, adapter.evaluation.data, folder, name)
    key = f"{folder}/spec.json"
    store.put(key, json.dumps(values).encode())
    return key


def _put(store: ObjectStore, data: Path, folder: str, name: str) -> str:
    store.put(f"{folder}/{name}", data.read_bytes())
    return name
