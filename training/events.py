"""What a job tells while it runs. As a line of JSON an event reads

    {"event": "step", "at_s": 1764…, "adapter": "captain", "step": 12, "loss": 0.41, …}

Lines are kept by `training.job_store`. After a worker was lost and resumed, steps since the last checkpoint are told
again: a reader takes the last word for an adapter and step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """Base of all events; `kind` is the line's `event`.

    Attributes:
        at_s: when it was told, in seconds since the epoch by its teller's clock; 0 before. Two events that differ only
            in this are equal.
    """

    kind: ClassVar[str]
    at_s: float = field(default=0.0, kw_only=True, compare=False)


@dataclass(frozen=True, slots=True)
class JobStarted(TrainingEvent):
    kind: ClassVar[str] = "job_started"
    job_id: str
    adapters: tuple[str, ...]
    workers: int


@dataclass(frozen=True, slots=True)
class WorkerStarted(TrainingEvent):
    """A worker takes up its share; told again when it goes on after a loss, or with another share."""

    kind: ClassVar[str] = "worker_started"
    worker: int
    workers: int
    host: str
    pid: int
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterStarted(TrainingEvent):
    """Told again after a resume, with the step it goes on from."""

    kind: ClassVar[str] = "adapter_started"
    adapter: str
    family: str
    rank: int
    step: int
    steps: int
    sequences: int
    truncated: int
    dropped: int


@dataclass(frozen=True, slots=True)
class AdapterStep(TrainingEvent):
    """One optimizer step, which is number `step` of `steps`, from 1. The loss is the mean over its own batch.

    `tokens` went through the model for it, prompts included.
    """

    kind: ClassVar[str] = "step"
    adapter: str
    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterEvaluated(TrainingEvent):
    kind: ClassVar[str] = "evaluated"
    adapter: str
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class AdapterFinished(TrainingEvent):
    """Its rows no longer change. `reason`: all steps done, or early stop."""

    kind: ClassVar[str] = "finished"
    adapter: str
    step: int
    loss: float
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterPublished(TrainingEvent):
    kind: ClassVar[str] = "published"
    adapter: str
    version: str
    alias: str


@dataclass(frozen=True, slots=True)
class AdapterFailed(TrainingEvent):
    """Stopped for a reason of its own; the others go on."""

    kind: ClassVar[str] = "adapter_failed"
    adapter: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RoundFinished(TrainingEvent):
    """All workers' adapters are saved. Who was busy for less than `seconds` waited for the others."""

    kind: ClassVar[str] = "round"
    round: int
    seconds: float
    busy_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class JobFinished(TrainingEvent):
    """The last line of a job that ran to its end, whether or not every adapter succeeded."""

    kind: ClassVar[str] = "job_finished"
    job_id: str
    published: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobFailed(TrainingEvent):
    """The last line of a driver whose job did not run to its end.

    Attributes:
        is_taken_over: another driver goes on with the job. What becomes of the job, that one tells.
    """

    kind: ClassVar[str] = "job_failed"
    job_id: str
    reason: str
    is_taken_over: bool = False


@dataclass(frozen=True, slots=True)
class JobCancelled(TrainingEvent):
    """Told by whoever cancelled it. Something told by its workers at the same moment may still follow."""

    kind: ClassVar[str] = "job_cancelled"
    job_id: str


EventSink = Callable[[TrainingEvent], None]

_KINDS: dict[str, type[TrainingEvent]] = {
    event.kind: event
    for event in (
        JobStarted,
        WorkerStarted,
        AdapterStarted,
        AdapterStep,
        AdapterEvaluated,
        AdapterFinished,
        AdapterPublished,
        AdapterFailed,
        RoundFinished,
        JobFinished,
        JobFailed,
        JobCancelled,
    )
}


def event_line(event: TrainingEvent) -> bytes:
    """With its newline. JSON has no infinity: a number that is not finite is told as null."""
    return json.dumps({"event": event.kind, **_plain(asdict(event))}).encode() + b"\n"


def told_us(event: TrainingEvent) -> int:
    """When it was told, in microseconds since the epoch."""
    return round(event.at_s * 1e6)


def parse_event(line: bytes) -> TrainingEvent:
    """What `event_line` wrote; null reads as NaN. Raises ValueError for anything else."""
    try:
        values = json.loads(line)
        kind = _KINDS[values["event"]]
        told = [one for one in fields(kind) if one.name in values or one.default is MISSING]
        return kind(**{one.name: _value(one.type, values[one.name]) for one in told})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an event of a training job: {line[:200]!r}") from error


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _value(declared: object, value: Any) -> Any:
    if declared == "float" and value is None:
        return math.nan
    return tuple(value) if isinstance(value, list) else value
