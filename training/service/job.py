"""One fine-tuning job of the API: what was asked for, and how far it has come. Pure, with the time passed in.

    validating_files → queued → running → succeeded | failed
    cancelled from each of the first three

A queued job waits for company, then gets a batch: one training job, with its store and its attempts, for several
adapters. Changes return a new record, or None where they change nothing; a job that ended never changes again.
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import InvalidRequestError
from storage.identity import DEFAULT_ALIAS, AdapterName
from training.spec import AdapterSpec


class FineTuningStatus(StrEnum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL = (FineTuningStatus.SUCCEEDED, FineTuningStatus.FAILED, FineTuningStatus.CANCELLED)

Level = Literal["info", "warn", "error"]


class Fault(BaseModel):
    """Why a job failed. `param` is the request's field that is to blame, if one is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: InvalidRequestError) -> Self:
        return cls(code=error.code, message=error.message, param=error.param)


class Note(BaseModel):
    """Something that happened to the job outside of its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: float = Field(description="Seconds since the epoch.")
    level: Level
    message: str


class FineTuningRequest(BaseModel):
    """What was asked for, checked: `adapter` has the fields of an `AdapterSpec` but name and data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str
    base: str
    base_id: str
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    is_seed_drawn: bool = Field(default=False, description="Nobody asked for this seed.")
    hyperparameters: dict[str, int | float | str] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None
    adapter: dict[str, Any] = Field(default_factory=dict)
    may_replace: bool = Field(
        default=False, description="Its version may take the place of one there is: an admin asked."
    )


class FineTuningJob(BaseModel):
    """A job's record. `attempts` counts how often its batch was started, `tokens` what it has trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    created_s: float
    request: FineTuningRequest
    status: FineTuningStatus = FineTuningStatus.VALIDATING
    queued_s: float | None = None
    batch: str | None = None
    attempts: int = 0
    is_alone: bool = Field(default=False, description="Shares its batch with nobody.")
    version: str | None = None
    tokens: int | None = None
    finished_s: float | None = None
    fault: Fault | None = None
    notes: tuple[Note, ...] = ()

    @classmethod
    def new(cls, job_id: str, request: FineTuningRequest, now_s: float) -> Self:
        job = cls(job_id=job_id, created_s=now_s, request=request)
        return job._changed(now_s, "the job was created; its files are being looked at")

    @property
    def name(self) -> str:
        """Of the adapter that it makes."""
        return self.request.suffix or self.job_id

    @property
    def adapter(self) -> AdapterName:
        return AdapterName(self.request.tenant, self.name)

    @property
    def may_replace(self) -> bool:
        """Nobody else's adapter is called as this job is."""
        return self.request.may_replace or self.request.suffix is None

    @property
    def alias(self) -> str:
        alias: str = self.request.adapter.get("alias", DEFAULT_ALIAS)
        return alias

    @property
    def model(self) -> str:
        """What a request names to use the adapter, once it is published."""
        return self.name if self.alias == DEFAULT_ALIAS else f"{self.name}@{self.alias}"

    def adapter_spec(self, data: str, held_out: str | None) -> AdapterSpec:
        """The adapter of a training specification, with its data where it lies now.

        Raises:
            pydantic.ValidationError: a field has a value that is not allowed.
        """
        fields = {"seed": self.request.seed, **self.request.adapter}
        evaluation = fields.get("evaluation") or {}
        if held_out is not None and isinstance(evaluation, dict):
            fields["evaluation"] = {**evaluation, "data": held_out}
        ours = {"name": self.name, "data": data, "may_replace": self.may_replace}
        return AdapterSpec.model_validate({**fields, **ours})

    # What happens to it.

    def validated(self, now_s: float) -> Self | None:
        if self.status is not FineTuningStatus.VALIDATING:
            return None
        return self._changed(
            now_s,
            "its files are valid; it is queued",
            status=FineTuningStatus.QUEUED,
            queued_s=now_s,
        )

    def assigned(self, batch: str, count: int, now_s: float) -> Self | None:
        """Put into a batch of so many, unless it has one."""
        if self.status is not FineTuningStatus.QUEUED or self.batch is not None:
            return None
        message = "it trains alone" if count == 1 else f"it trains together with {count - 1} more"
        return self._changed(now_s, f"{message}, as {batch}", batch=batch)

    def attempted(self, attempts: int) -> Self | None:
        """Its batch is about to be started for the so-many-th time."""
        if self.status.is_final or self.attempts >= attempts:
            return None
        return self.model_copy(update={"attempts": attempts})

    def held_up(self, message: str, now_s: float) -> Self | None:
        """Its batch cannot begin now; said once, however long it lasts and however often it comes."""
        is_told = any(note.message == message for note in self.notes)
        if self.status is not FineTuningStatus.QUEUED or is_told:
            return None
        return self._changed(now_s, message, level="warn")

    def returned(self, batch: str, now_s: float, reason: str, *, is_alone: bool) -> Self | None:
        """Back to the queue, out of a batch that could not train it."""
        if self.status.is_final or self.batch != batch:
            return None
        return self._changed(
            now_s,
            reason,
            level="warn",
            status=FineTuningStatus.QUEUED,
            batch=None,
            attempts=0,
            is_alone=is_alone,
        )

    def running(self, now_s: float) -> Self | None:
        if self.status is not FineTuningStatus.QUEUED:
            return None
        return self._changed(now_s, "training has begun", status=FineTuningStatus.RUNNING)

    def succeeded(self, version: str, tokens: int, now_s: float) -> Self | None:
        if self.status.is_final:
            return None
        return self._changed(
            now_s,
            f"the adapter is published: {self.model}, version {version}",
            status=FineTuningStatus.SUCCEEDED,
            version=version,
            tokens=tokens,
            finished_s=now_s,
        )

    def failed(self, fault: Fault, now_s: float) -> Self | None:
        if self.status.is_final:
            return None
        return self._changed(
            now_s,
            f"the job failed: {fault.message}",
            level="error",
            status=FineTuningStatus.FAILED,
            fault=fault,
            finished_s=now_s,
        )

    def cancelled(self, now_s: float, message: str = "the job was cancelled") -> Self | None:
        if self.status.is_final:
            return None
        return self._changed(now_s, message, status=FineTuningStatus.CANCELLED, finished_s=now_s)

    def _changed(self, now_s: float, message: str, level: Level = "info", **fields: Any) -> Self:
        note = Note(at_s=now_s, level=level, message=message)
        return self.model_copy(update={**fields, "notes": (*self.notes, note)})


def new_job_id(now_s: float) -> str:
    """Ids sort by the time they were made at."""
    return f"ftjob-{int(now_s * 1000):011x}{secrets.token_hex(6)}"


def new_batch_id(now_s: float) -> str:
    return f"ftbatch-{int(now_s * 1000):011x}{secrets.token_hex(4)}"
