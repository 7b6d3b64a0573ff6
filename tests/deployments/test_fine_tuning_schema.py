"""Whatever a client calls an adapter's fields: a job that can be kept, or an error that names the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.fine_tuning_schema import CreateJob
from storage.errors import InvalidRequestError
from storage.records import encode
from training.service.job import FineTuningJob
from training.spec import AdapterSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*AdapterSpec.model_fields, "evaluation", "family", "nothing"])


def asked(adapter: Any, **fields: Any) -> FineTuningJob:
    body = {"model": "base", "training_file": "file-1", "adapter": adapter, **fields}
    request = CreateJob.model_validate(body).request("us", "base", "/bases/base")
    return FineTuningJob.new("ftjob-1", request, 1.0)


@settings(max_examples=150)
@given(st.dictionaries(FIELDS, JSON, max_size=3), st.booleans())
def test_any_adapter_is_kept_or_refused_by_name(adapter: Any, has_held_out: bool) -> None:
    fields = {"validation_file": "file-2"} if has_held_out else {}
    try:
        job = asked(adapter, **fields)
    except ValidationError as error:
        assert error.errors()[0]["loc"]
    except InvalidRequestError as error:
        assert (error.param or "").startswith("adapter")
        error.message.encode()
    else:
        assert FineTuningJob.model_validate_json(encode(job)) == job


def test_hyperparameters_become_the_adapters_fields() -> None:
    hyperparameters = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5}
    job = asked({"family": "lora"}, hyperparameters=hyperparameters, seed=4)
    spec = job.adapter_spec("data.jsonl", None)
    assert (spec.epochs, spec.batch_size, spec.seed) == (2, 8, 4)
    assert spec.learning_rate == pytest.approx(1e-4)
    assert (spec.name, spec.rank) == ("ftjob-1", 4)
    held_out = asked({"evaluation": {"every_steps": 5}}, validation_file="file-2")
    evaluation = held_out.adapter_spec("data.jsonl", "held-out.jsonl").evaluation
    assert evaluation is not None
    assert (str(evaluation.data), evaluation.every_steps) == ("held-out.jsonl", 5)


@pytest.mark.parametrize(
    "patterns", [{r"((\w|\.)+)+!": 2}, {"": 2}, {"q" * 200: 2}, {f"m{n}": 2 for n in range(65)}]
)
def test_ranks_are_by_plain_module_names(patterns: dict[str, int]) -> None:
    """A regular expression of a stranger's could hold the whole process up while it is matched."""
    with pytest.raises(InvalidRequestError) as caught:
        asked({"rank_pattern": patterns})
    assert caught.value.param == "adapter.rank_pattern"
    kept = asked({"rank_pattern": {"layers.0.q_proj": 2}}).adapter_spec("d", None)
    assert kept.rank_of("model.layers.0.q_proj") == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 10**400), ("epochs", 1e308), ("warmup_steps", 10**400)],
    ids=["steps", "epochs", "warmup"],
)
def test_a_length_that_nobody_could_train_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        asked({field: value})
    assert caught.value.param == f"adapter.{field}"
