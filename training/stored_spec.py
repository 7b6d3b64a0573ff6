"""Specifications that lie in the registry's store, for jobs that cannot see their author's disk.

A specification and its data lie in one folder of the store; as on a disk, relative paths are relative to that folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from storage.errors import InvalidRequestError, SpecificationError
from storage.identity import canonical_json, checked_name
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError
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


def spec_key(job_id: str) -> str:
    """Where the specification of a job is stored. Raises InvalidRequestError for an id that is not a valid name."""
    return f"jobs/{checked_name(job_id, param='job_id')}/spec/spec.json"


def stored_adapters(store: ObjectStore, job_id: str) -> frozenset[str]:
    """The names of the adapters that a job shall make. Raises SpecificationError when there is no specification."""
    try:
        values = json.loads(store.get(spec_key(job_id)).data)
    except ObjectNotFoundError:
        raise SpecificationError(f"the job {job_id!r} has no specification in the store") from None
    return frozenset(adapter["name"] for adapter in values["adapters"])


def store_spec(store: ObjectStore, spec: TrainingSpec, job_id: str) -> str:
    """Put a specification and its data into the folder of a job; returns the key to submit.

    The data is as it is now: what happens to the files later does not reach the job. Storing the same again changes
    nothing.

    Raises:
        InvalidRequestError: the id is that of another job.
    """
    key = spec_key(job_id)
    folder = key.rpartition("/")[0]
    values = spec.model_dump(mode="json", exclude_none=True)
    for adapter, written in zip(spec.adapters, values["adapters"], strict=True):
        written["data"] = f"data/{adapter.name}.jsonl"
        _create(store, f"{folder}/{written['data']}", adapter.data.read_bytes(), job_id)
        if adapter.evaluation is not None and adapter.evaluation.data is not None:
            held_out = f"held-out/{adapter.name}.jsonl"
            written["evaluation"]["data"] = held_out
            _create(store, f"{folder}/{held_out}", adapter.evaluation.data.read_bytes(), job_id)
    _create(store, key, canonical_json(values), job_id)
    return key


def _create(store: ObjectStore, key: str, data: bytes, job_id: str) -> None:
    try:
        store.put_if_absent(key, data)
    except PreconditionFailedError:
        if store.get(key).data != data:
            raise InvalidRequestError(
                f"there is another training job {job_id!r}", param="job_id"
            ) from None
