"""What is settled before a worker starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import InvalidRequestError, SpecificationError
from training.config import TrainingSettings
from training.job_plan import plan_job
from training.spec import TrainingSpec
from training.spec_file import parse_spec


def spec_on(tiny_llama_dir: Path, folder: Path, *adapters: dict[str, Any]) -> TrainingSpec:
    lines = [{"prompt": f"the fox {n}", "completion": " jumps" * (n % 3 + 1)} for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    filled = [{"data": "data.jsonl", "rank": 1, **one} for one in adapters]
    return parse_spec({"base": str(tiny_llama_dir), "adapters": filled}, folder)


def test_a_plan_has_the_data_the_steps_and_the_base(tiny_llama_dir: Path, tmp_path: Path) -> None:
    spec = spec_on(
        tiny_llama_dir,
        tmp_path,
        {"name": "a", "epochs": 2, "evaluation": {"fraction": 0.25}},
        {"name": "b", "steps": 70, "rank": 8},
    )
    plan = plan_job(spec, TrainingSettings())
    assert (len(plan.data["a"].training), len(plan.data["a"].held_out)) == (15, 5)
    assert not set(plan.data["a"].training) & set(plan.data["a"].held_out)
    assert plan.num_steps == {"a": 8, "b": 70}
    assert plan.costs["b"] > plan.costs["a"] > 0
    assert "model.layers.0.self_attn.q_proj" in plan.base.projections


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"target_modules": ["c_attn"]}, SpecificationError, "no linear layer 'c_attn'"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
            SpecificationError,
            "no module that it targets fits the pattern 'v_proj'",
        ),
        ({"sequence_length": 4096}, SpecificationError, "more than the model's 512 positions"),
        ({"sequence_length": 2}, SpecificationError, "a: no example has a completion"),
    ],
)
def test_what_no_worker_could_train_is_refused_before_one_starts(
    tiny_llama_dir: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        plan_job(spec_on(tiny_llama_dir, tmp_path, {"name": "a", **fields}), TrainingSettings())


def test_a_base_that_is_not_there_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    spec = spec_on(tiny_llama_dir, tmp_path, {"name": "a"})
    with pytest.raises(InvalidRequestError, match="no model at"):
        plan_job(spec.model_copy(update={"base": str(tmp_path / "none")}), TrainingSettings())


def test_a_jobs_digest_is_of_what_it_trains_and_not_of_where_that_lies(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    def digest(folder: str, **fields: Any) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        one = {"name": "a", "evaluation": {"fraction": 0.25}, **fields}
        return plan_job(
            spec_on(tiny_llama_dir, tmp_path / folder, one), TrainingSettings()
        ).digest()

    assert digest("here") == digest("there")
    changes: list[dict[str, Any]] = [{"rank": 2}, {"seed": 2}, {"epochs": 2}, {"alias": "prod"}]
    others = [digest("here", **change) for change in changes]
    assert len({digest("here"), *others}) == 5
    spec = spec_on(tiny_llama_dir, tmp_path / "here", {"name": "a"})
    (tmp_path / "here" / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert plan_job(spec, TrainingSettings()).digest() not in {digest("there"), *others}
