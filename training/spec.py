"""What a training job shall make: one base model, several adapters, each with a data set and settings of its own.

A specification is plain data. `spec_file.read_spec` makes one from YAML or JSON; nothing here opens a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from storage.errors import InvalidRequestError
from storage.identity import DEFAULT_ALIAS, DEFAULT_TENANT, checked_name

Family = Literal["flora", "lora", "rslora", "dora", "ia3"]

ALL_LINEAR: Literal["all-linear"] = "all-linear"

DEFAULT_LEARNING_RATE = {"flora": 8e-3, "lora": 2e-4, "rslora": 2e-4, "dora": 2e-4, "ia3": 3e-3}
"""FLoRA's is the paper's (section 4): its rows scale weights that exist, so they need larger steps than LoRA's. So do
IA3's vectors; theirs is T-Few's (arXiv 2205.05638)."""

FEEDFORWARD_MODULES = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")
"""Last layers of feedforward blocks by their usual names: IA3 scales what goes into them."""


MAX_STEPS = 10_000_000
"""Far beyond any use; larger numbers are slips, and some of them no float can hold."""


class Evaluation(BaseModel):
    """Held-out examples, by a file of their own or as a part of the training file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path | None = None
    fraction: float | None = Field(default=None, gt=0, le=0.5, description="Of the training file.")
    every_steps: int = Field(default=20, ge=1, le=MAX_STEPS)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.data is None) == (self.fraction is None):
            raise PydanticCustomError("one_source", "give either data or fraction")
        return self


class EarlyStop(BaseModel):
    """Stop when the held-out loss has not fallen by `min_improvement` in `patience` evaluations in a row.

    What is published is the adapter as it was at its best evaluation, also when it comes to its last step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience: int = Field(default=3, ge=1, le=MAX_STEPS)
    min_improvement: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class AdapterSpec(BaseModel):
    """One adapter. `learning_rate`, `alpha` and the length are never None once validated, where the family has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    data: Path = Field(
        description="JSONL; a path from the specification's folder, or in a file s3://bucket/key."
    )
    family: Family = "flora"
    rank: int = Field(ge=1, le=1024, description="IA3 has none: leave it out.")
    rank_pattern: dict[str, int] = Field(
        default_factory=dict,
        description="Other ranks by module, keys as in PEFT: `q_proj`, or a regular expression; first match wins.",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default=ALL_LINEAR, description="Ends of module paths (`q_proj`), or all-linear."
    )
    offset: Literal[0, 1] = Field(
        default=1, description="FLoRA: 1 starts at the base model for any rank; 0 is the paper's."
    )
    alpha: float | None = Field(
        default=None, gt=0, description="LoRA's and DoRA's; twice the rank if unset."
    )
    feedforward_modules: tuple[str, ...] = Field(
        default=FEEDFORWARD_MODULES,
        description="IA3: ends of paths of modules whose inputs are scaled; outputs of the others are.",
    )
    batch_size: int = Field(default=4, ge=1, le=4096, description="Examples of a step.")
    sequence_length: int = Field(
        default=512, ge=2, description="Longer examples are cut at the end, and counted."
    )
    loss: Literal["completion", "all"] = Field(
        default="completion", description="The tokens that are learnt: answers, or prompts too."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="If unset 8e-3 for FLoRA, 3e-3 for IA3, 2e-4 for LoRA and its kin.",
    )
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Towards rows without an effect; IA3's vectors and DoRA's magnitudes towards the base model's.",
    )
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="Largest norm of the adapter's gradient; null: no clipping."
    )
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="3 if steps is unset too.",
    )
    evaluation: Evaluation | None = Field(
        default=None,
        description="Held-out loss as it learns; its last step is published, or with early_stop its best evaluation.",
    )
    early_stop: EarlyStop | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="The job's if unset.")
    alias: str = Field(default=DEFAULT_ALIAS, description="What the new version is called.")
    may_replace: bool = Field(
        default=True,
        description="False: an adapter that somebody made meanwhile keeps its aliases; the new version has none then.",
    )

    @field_validator("name", "alias")
    @classmethod
    def _valid_name(cls, text: str) -> str:
        return _checked(text)

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise PydanticCustomError("no_targets", "name at least one module, or all-linear")
        return targets

    @field_validator("rank_pattern")
    @classmethod
    def _valid_patterns(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern, rank in patterns.items():
            if not 1 <= rank <= 1024:
                raise PydanticCustomError("rank_range", f"{pattern}: a rank is 1 to 1024")
            try:
                re.compile(pattern)
            except re.error as error:
                raise PydanticCustomError("bad_pattern", f"{pattern}: {error}") from None
        return patterns

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        family = filled.get("family", "flora")
        # Of another type it is refused with the other fields.
        if isinstance(family, str) and filled.get("learning_rate") is None:
            filled["learning_rate"] = DEFAULT_LEARNING_RATE.get(family)
        if family == "ia3":
            filled.setdefault("rank", 1)
        if filled.get("steps") is None and filled.get("epochs") is None:
            filled["epochs"] = 3.0
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.family in ("flora", "ia3") and self.alpha is not None:
            raise PydanticCustomError("no_alpha", "alpha is LoRA's; FLoRA has none, nor has IA3")
        if self.family != "flora" and self.offset != 1:
            raise PydanticCustomError("no_offset", "offset is FLoRA's")
        if self.family == "ia3" and (self.rank != 1 or self.rank_pattern):
            raise PydanticCustomError("no_rank", "IA3 has one vector for each module and no rank")
        if self.family != "ia3" and self.feedforward_modules != FEEDFORWARD_MODULES:
            raise PydanticCustomError("no_feedforward", "feedforward_modules is IA3's")
        if self.steps is not None and self.epochs is not None:
            raise PydanticCustomError("two_lengths", "give either steps or epochs")
        if self.early_stop is not None and self.evaluation is None:
            raise PydanticCustomError("no_evaluation", "early_stop needs evaluation")
        return self

    def rank_of(self, module: str) -> int:
        """The rank in one module, by its full path."""
        for pattern, rank in self.rank_pattern.items():
            if matches(pattern, module):
                return rank
        return self.rank

    def scaling_of(self, module: str) -> float:
        """The factor before LoRA's and DoRA's rows: alpha/r, or alpha/√r for rsLoRA."""
        rank = self.rank_of(module)
        alpha = self.alpha if self.alpha is not None else 2.0 * self.rank
        return alpha / (rank**0.5 if self.family == "rslora" else rank)

    def targets(self, module: str) -> bool:
        """Whether this adapter changes the linear projection at a full module path."""
        if self.target_modules == ALL_LINEAR:
            return True
        return _ends_in(module, self.target_modules)

    def scales_input(self, module: str) -> bool:
        """IA3: whether the vector of the projection at a full module path scales its inputs, not its outputs."""
        return _ends_in(module, self.feedforward_modules)

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps over a training set of that size."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, -(-int(self.epochs * num_examples) // self.batch_size))


class TrainingSpec(BaseModel):
    """One job. Names of adapters are unique in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(
        min_length=1,
        description="A directory in transformers' layout, a .gguf file, s3://bucket/prefix with either, or a hub id.",
    )
    base_id: str = Field(
        default="", description="What users call the base; its last part if unset."
    )
    tenant: str = DEFAULT_TENANT
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="bfloat16",
        description="Of the frozen base, which is served in bfloat16 by default; adapters train in float32 or wider.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_every_steps: int = Field(default=50, ge=1)
    deterministic: bool = Field(
        default=False,
        description="An adapter whose loss or gradient breaks fails at once, but keeps its place and its sequences, "
        "and costs its time, until its last step: on the same workers the others become, to the bit, what they would "
        "beside it healthy until then. torch uses deterministic algorithms only.",
    )
    adapters: tuple[AdapterSpec, ...] = Field(min_length=1)

    @field_validator("tenant")
    @classmethod
    def _valid_tenant(cls, text: str) -> str:
        return _checked(text)

    @model_validator(mode="after")
    def _fill(self) -> Self:
        if not self.base_id:
            object.__setattr__(self, "base_id", Path(self.base).name.lower())
        seeded = (
            adapter if adapter.seed is not None else adapter.model_copy(update={"seed": self.seed})
            for adapter in self.adapters
        )
        object.__setattr__(self, "adapters", tuple(seeded))
        return self


def _ends_in(module: str, ends: tuple[str, ...]) -> bool:
    return any(module == end or module.endswith(f".{end}") for end in ends)


def matches(pattern: str, module: str) -> bool:
    """Whether a key of `rank_pattern` is for a module, by its full path; PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _checked(text: str) -> str:
    try:
        return checked_name(text)
    except InvalidRequestError as error:
        raise PydanticCustomError("bad_name", "{reason}", {"reason": error.message}) from None
