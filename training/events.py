"""What a job tells while it runs: one JSON object a line, each line written whole, so a reader never sees half of one.

    {"event": "step", "time_s": 1764…, "adapter": "captain", "step": 12, "loss": 0.41, …}

After a worker was lost and resumed, steps since its last checkpoint are told again: the later line counts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """Base of all events; `kind` is the line's `event`."""

    kind: ClassVar[str]


@dataclass(frozen=True, slots=True)
class JobStarted(TrainingEvent):
    kind: ClassVar[str] = "job_started"
    job_id: str
    adapters: tuple[str, ...]
    workers: int


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
    """One optimizer step, which is number `step` of `steps`, from 1. The loss is the mean over its own batch."""

    kind: ClassVar[str] = "step"
    adapter: str
    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float


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
class JobFinished(TrainingEvent):
    """The last line of a job that ran to its end, whether or not every adapter succeeded."""

    kind: ClassVar[str] = "job_finished"
    job_id: str
    published: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobFailed(TrainingEvent):
    """The last line of a job that did not run to its end."""

    kind: ClassVar[str] = "job_failed"
    job_id: str
    reason: str


EventSink = Callable[[TrainingEvent], None]

_KINDS: dict[str, type[TrainingEvent]] = {
    event.kind: event
    for event in (
        JobStarted,
        AdapterStarted,
        AdapterStep,
        AdapterEvaluated,
        AdapterFinished,
        AdapterPublished,
        AdapterFailed,
        JobFinished,
        JobFailed,
    )
}


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events in the order they were told, and where to read on."""

    events: tuple[TrainingEvent, ...]
    next: int


class EventWriter:
    """Appends events to a file. Several processes may write to one file: each event is a single append."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._clock = clock

    def __call__(self, event: TrainingEvent) -> None:
        line = {"event": event.kind, "time_s": self._clock(), **_plain(asdict(event))}
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read_events(path: Path, after: int = 0) -> EventPage:
    """The whole lines from byte `after` on; an empty page while there is no file.

    Args:
        after: 0, or the `next` of an earlier page.
    """
    try:
        with path.open("rb") as file:
            file.seek(after)
            data = file.read()
    except FileNotFoundError:
        return EventPage((), after)
    whole = data[: data.rfind(b"\n") + 1]
    events = tuple(_parsed(json.loads(line)) for line in whole.splitlines())
    return EventPage(events, after + len(whole))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; a number that is not finite is told as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _parsed(values: dict[str, Any]) -> TrainingEvent:
    kind = _KINDS[values["event"]]
    arguments: dict[str, Any] = {}
    for field in fields(kind):
        value = values[field.name]
        if field.type == "float" and value is None:
            value = math.nan
        arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
