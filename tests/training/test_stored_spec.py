"""A job that cannot see its author's disk sees the same specification and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.errors import InvalidRequestError, SpecificationError
from storage.local_store import LocalObjectStore
from training.spec_file import read_spec
from training.stored_spec import fetch_spec, store_spec


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path / "store")


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    for name in ("a", "b", "held"):
        line = json.dumps({"prompt": name, "completion": name})
        (tmp_path / f"{name}.jsonl").write_text(line)
    path = tmp_path / "spec.yaml"
    path.write_text(
        """
base: b
adapters:
  - {name: a, rank: 1, data: a.jsonl, evaluation: {data: held.jsonl}}
  - {name: b, rank: 2, data: b.jsonl, evaluation: {fraction: 0.1}, learning_rate: 0.001}
"""
    )
    return path


def test_a_stored_specification_comes_back_with_its_data(
    store: LocalObjectStore, spec_path: Path, tmp_path: Path
) -> None:
    spec = read_spec(spec_path)
    key = store_spec(store, spec, "job-1")
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.jsonl").unlink()
    fetched = read_spec(fetch_spec(store, key, tmp_path / "elsewhere"))
    for before, after in zip(spec.adapters, fetched.adapters, strict=True):
        assert after.data.read_text() == json.dumps(
            {"prompt": after.name, "completion": after.name}
        )
        unlike = {"data", "evaluation"}
        assert after.model_dump(exclude=unlike) == before.model_dump(exclude=unlike)
    evaluation = fetched.adapters[0].evaluation
    assert evaluation is not None and evaluation.data is not None
    assert json.loads(evaluation.data.read_text())["prompt"] == "held"


def test_the_same_job_may_be_stored_again_but_not_another_under_its_id(
    store: LocalObjectStore, spec_path: Path, tmp_path: Path
) -> None:
    key = store_spec(store, read_spec(spec_path), "job-1")
    assert store_spec(store, read_spec(spec_path), "job-1") == key
    with pytest.raises(InvalidRequestError, match="another training job 'job-1'"):
        store_spec(store, read_spec(spec_path, {"seed": 7}), "job-1")


def test_a_specification_that_is_not_there_is_named(
    store: LocalObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(SpecificationError, match=r"store:jobs/none/spec\.json: there is no such"):
        fetch_spec(store, "jobs/none/spec.json", tmp_path / "elsewhere")
