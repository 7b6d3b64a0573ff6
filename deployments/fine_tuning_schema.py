"""The body of a fine-tuning job, in OpenAI's fields and ours, and what it asks a training job for."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import InvalidRequestError, UnsupportedFieldError
from storage.identity import checked_name
from training.service.job import FineTuningJob, FineTuningRequest
from training.spec import DEFAULT_LEARNING_RATE

DEFAULT_RANK = 4
_SEEDS = 2**31
_ELSEWHERE = {
    "name": "suffix",
    "data": "training_file",
    "seed": "seed",
    "may_replace": "what an admin's key is for",
    "evaluation.data": "validation_file",
}
"""Fields of an adapter that the API has in a place of its own."""

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_MAX_METADATA = 16
_DEEPEST = 4
_LONGEST = 1024
_MAX_RANKS = 64
_MODULE = re.compile(r"[\w.]{1,128}")

Auto = Literal["auto"]


class Hyperparameters(BaseModel):
    """`auto`, and what is left out, are the family's defaults."""

    model_config = _STRICT

    n_epochs: Annotated[int, Field(ge=1, le=10_000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Auto = Field(
        default="auto", description="Of the family's own learning rate."
    )


class Supervised(BaseModel):
    model_config = _STRICT

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(BaseModel):
    model_config = _STRICT

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class CreateJob(BaseModel):
    """A job trains one adapter; jobs that come at the same time share a batch."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "example": {
                "model": "smollm2-135m-instruct",
                "training_file": "file-3f2a9c41d07be5a81c9e44b0",
                "suffix": "captain",
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 3}},
                },
                "adapter": {"family": "flora", "rank": 4},
            }
        },
    )

    model: str = Field(description="The base model's id.")
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(
        default=None,
        description="The adapter's name, and what a request calls it; the job's id if unset.",
    )
    seed: int | None = Field(default=None, ge=0, lt=_SEEDS)
    hyperparameters: Hyperparameters | None = Field(
        default=None, description="As in `method`, which OpenAI prefers."
    )
    method: Method | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=_MAX_METADATA)
    integrations: list[Any] | None = Field(
        default=None, max_length=0, description="None are known."
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="bfloat16", description="Of the frozen base."
    )
    adapter: dict[str, Any] = Field(
        default_factory=dict,
        description="family, rank, target_modules, learning_rate, steps, … as in a training specification.",
    )

    def request(self, tenant: str, base_id: str, base: str) -> FineTuningRequest:
        """What is to be trained, checked as far as it can be without looking at files.

        Raises:
            InvalidRequestError, UnsupportedFieldError: name the field.
        """
        for name, value in (self.metadata or {}).items():
            if len(name) > 64 or len(value) > 512:
                raise InvalidRequestError(
                    "metadata: keys have up to 64 characters, values up to 512", param="metadata"
                )
        request = FineTuningRequest(
            tenant=tenant,
            base=base,
            base_id=base_id,
            dtype=self.dtype,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=None if self.suffix is None else checked_name(self.suffix, param="suffix"),
            seed=secrets.randbelow(_SEEDS) if self.seed is None else self.seed,
            is_seed_drawn=self.seed is None,
            hyperparameters=self._hyperparameters().model_dump(),
            metadata=self.metadata,
            adapter=self._adapter(),
        )
        _check_adapter(request)
        return request

    def _hyperparameters(self) -> Hyperparameters:
        if self.method is None:
            return self.hyperparameters or Hyperparameters()
        if self.hyperparameters is not None:
            raise InvalidRequestError(
                "give hyperparameters or method, not both", param="hyperparameters"
            )
        return self.method.supervised.hyperparameters

    def _adapter(self) -> dict[str, Any]:
        """The adapter's fields, the hyperparameters among them."""
        _check_plain(self.adapter)
        fields = dict(self.adapter)
        _check_rank_pattern(fields.get("rank_pattern"))
        for path, place in _ELSEWHERE.items():
            if _has(fields, path):
                raise UnsupportedFieldError(
                    f"adapter.{path}: here that is {place}", param=f"adapter.{path}"
                )
        family = fields.get("family", "flora")
        if family != "ia3":
            fields.setdefault("rank", DEFAULT_RANK)
        asked = self._hyperparameters()
        wanted: dict[str, Any] = {"epochs": asked.n_epochs, "batch_size": asked.batch_size}
        factor = asked.learning_rate_multiplier
        if factor != "auto" and isinstance(family, str) and family in DEFAULT_LEARNING_RATE:
            wanted["learning_rate"] = DEFAULT_LEARNING_RATE[family] * factor
        for name, value in wanted.items():
            if value == "auto":
                continue
            if name in fields or (name == "epochs" and "steps" in fields):
                raise InvalidRequestError(
                    f"adapter.{name} is a hyperparameter too; give one of them",
                    param=f"adapter.{name}",
                )
            fields[name] = value
        return fields


def _check_adapter(request: FineTuningRequest) -> None:
    """Raises InvalidRequestError for a field of the adapter that a specification would not take."""
    held_out = None if request.validation_file is None else "validation.jsonl"
    try:
        FineTuningJob.new("ftjob-0", request, 0.0).adapter_spec("training.jsonl", held_out)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(["adapter", *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise UnsupportedFieldError(f"there is no field {param}", param=param) from None
        raise InvalidRequestError(f"{param}: {first['msg']}", param=param) from None


def _check_rank_pattern(patterns: Any) -> None:
    """Raises InvalidRequestError for regular expressions: one can take for ever to match, here in the ingress."""
    if not isinstance(patterns, Mapping):
        return  # refused with the other fields, by its type
    param = "adapter.rank_pattern"
    if len(patterns) > _MAX_RANKS:
        raise InvalidRequestError(f"{param}: has more than {_MAX_RANKS} keys", param=param)
    for name in patterns:
        if not _MODULE.fullmatch(name):
            raise InvalidRequestError(
                f"{param}: {name[:64]!r} is not the plain name of a module, like q_proj",
                param=param,
            )


def _check_plain(value: Any, path: str = "adapter") -> None:
    """Raises InvalidRequestError for what Python reads as JSON and cannot write: NaN, half a character, great depth."""
    is_plain = path.count(".") <= _DEEPEST
    match value:
        case float():
            is_plain = math.isfinite(value)
        case str():
            is_plain = value.isprintable() or value.isspace()
        case list():
            for number, part in enumerate(value[: _LONGEST + 1] if is_plain else ()):
                _check_plain(part, f"{path}.{number}")
            is_plain = is_plain and len(value) <= _LONGEST
        case dict():
            for name, part in value.items() if is_plain else ():
                _check_plain(name, path)
                _check_plain(part, f"{path}.{name}")
    if not is_plain:
        raise InvalidRequestError(f"{path}: is no value that a field may have", param=path)


def _has(fields: Mapping[str, Any], path: str) -> bool:
    outer, _, inner = path.partition(".")
    if not inner:
        return outer in fields
    return isinstance(fields.get(outer), Mapping) and inner in fields[outer]
