"""Fine-tuning jobs as the API shows them: plain JSON values in OpenAI's shapes, with a few fields of ours beside."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from heapq import merge
from itertools import groupby
from typing import Any

from storage.errors import InvalidRequestError
from storage.identity import sha256_hex
from training.event_text import describe
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterStep,
    TrainingEvent,
    event_line,
    told_us,
)
from training.service.job import FineTuningJob, FineTuningStatus

_ID_DIGITS = 24
_VERSION_DIGITS = 12
_TIME_DIGITS = 14
_SEED_DIGITS = 10
_EVENT_ID = re.compile(f"ftevent-([0-9a-f]{{{_TIME_DIGITS}}})[0-9a-f]{{{_SEED_DIGITS}}}")


def job_view(job: FineTuningJob) -> dict[str, Any]:
    asked = job.request
    has_succeeded = job.status is FineTuningStatus.SUCCEEDED
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_s),
        "finished_at": None if job.finished_s is None else int(job.finished_s),
        "status": job.status.value,
        "error": None if job.fault is None else job.fault.model_dump(),
        "model": asked.base_id,
        "fine_tuned_model": job.model if has_succeeded else None,
        "trained_tokens": job.tokens,
        "training_file": asked.training_file,
        "validation_file": asked.validation_file,
        "hyperparameters": asked.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": asked.hyperparameters}},
        "seed": asked.seed,
        "metadata": asked.metadata,
        "organization_id": asked.tenant,
        "result_files": [],
        "integrations": [],
        "estimated_finish": None,
        "user_provided_suffix": asked.suffix,
        "adapter": {"name": job.name, **asked.adapter},
        "training_job": job.batch,
    }


def events_view(
    job: FineTuningJob, training: Iterable[TrainingEvent], after: str | None = None
) -> Iterator[dict[str, Any]]:
    """What happened to a job, newest first; each is made when it is asked for.

    Args:
        training: what its training job told of its adapter, newest first.
        after: an event's id; only what is older.
    """
    notes = sorted((_note(job, number) for number in range(len(job.notes))), key=_id, reverse=True)
    told = (
        shown
        for _, at_once in groupby(training, key=told_us)
        for shown in sorted((_training_event(job, one) for one in at_once), key=_id, reverse=True)
    )
    for shown in merge(notes, told, key=_id, reverse=True):
        if after is None or _id(shown) < after:
            yield shown


def event_us(event_id: str) -> int:
    """When the event of this id happened, in microseconds since the epoch. Raises InvalidRequestError."""
    found = _EVENT_ID.fullmatch(event_id)
    if found is None:
        raise InvalidRequestError(f"{event_id!r} is not an event's id", param="after")
    return int(found[1], 16)


def checkpoints_view(job: FineTuningJob, training: Iterable[TrainingEvent]) -> list[dict[str, Any]]:
    """What of a job can be asked: the version that it published.

    Args:
        training: what its training job told of its adapter, newest first; gone through no further than needed.
    """
    if job.version is None:
        return []
    trained, held_out = _last_losses(job, training)
    step = 0 if trained is None else trained.step
    return [
        {
            "id": f"ftckpt-{sha256_hex(f'{job.job_id} {job.version}'.encode())[:_ID_DIGITS]}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(job.finished_s or job.created_s),
            "fine_tuned_model_checkpoint": f"{job.name}@{job.version[:_VERSION_DIGITS]}",
            "fine_tuning_job_id": job.job_id,
            "step_number": step,
            "metrics": {
                "step": step,
                "train_loss": None if trained is None else _number(trained.loss),
                "full_valid_loss": None if held_out is None else _number(held_out.loss),
            },
        }
    ]


def _last_losses(
    job: FineTuningJob, training: Iterable[TrainingEvent]
) -> tuple[AdapterStep | None, AdapterEvaluated | None]:
    asked = job.request
    is_evaluated = asked.validation_file is not None or bool(asked.adapter.get("evaluation"))
    trained, held_out = None, None
    for event in training:
        if isinstance(event, AdapterStep):
            trained = trained or event
        elif isinstance(event, AdapterEvaluated):
            held_out = held_out or event
        if trained is not None and (held_out is not None or not is_evaluated):
            break
    return trained, held_out


def _note(job: FineTuningJob, number: int) -> dict[str, Any]:
    note = job.notes[number]
    seed = f"{job.job_id} {number} {note.message}".encode()
    return _event(seed, round(note.at_s * 1e6), note.message, level=note.level)


def _training_event(job: FineTuningJob, event: TrainingEvent) -> dict[str, Any]:
    data = None
    if isinstance(event, AdapterStep):
        data = {
            "step": event.step,
            "total_steps": event.steps,
            "train_loss": _number(event.loss),
            "learning_rate": event.learning_rate,
        }
    elif isinstance(event, AdapterEvaluated):
        data = {"step": event.step, "full_valid_loss": _number(event.loss)}
    level = "error" if isinstance(event, AdapterFailed) else "info"
    seed = job.job_id.encode() + event_line(event)
    return _event(seed, told_us(event), describe(event), level=level, data=data)


def _event(
    seed: bytes, at_us: int, message: str, *, level: str, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Its id is its place: the time, and among what happened at that time a digest of what it is made of."""
    return {
        "id": f"ftevent-{at_us:0{_TIME_DIGITS}x}{sha256_hex(seed)[:_SEED_DIGITS]}",
        "object": "fine_tuning.job.event",
        "created_at": at_us // 1_000_000,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }


def _id(shown: Mapping[str, Any]) -> str:
    return str(shown["id"])


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
