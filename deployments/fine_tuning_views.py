"""Fine-tuning jobs as the API shows them: plain JSON values in OpenAI's shapes, with a few fields of ours beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from storage.identity import sha256_hex
from training.event_text import describe
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterStep,
    TrainingEvent,
    event_line,
)
from training.service.job import FineTuningJob, FineTuningStatus

_ID_DIGITS = 24
_VERSION_DIGITS = 12


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


def events_view(job: FineTuningJob, training: Sequence[TrainingEvent]) -> list[dict[str, Any]]:
    """Everything that happened to a job, newest first.

    Args:
        training: what its training job told of its adapter.
    """
    told = [
        _event(
            f"{job.job_id} {number} {note.message}".encode(),
            note.at_s,
            note.message,
            level=note.level,
        )
        for number, note in enumerate(job.notes)
    ]
    told += [_training_event(job, event) for event in training]
    return [shown for _, shown in sorted(told, key=lambda one: one[0], reverse=True)]


def checkpoints_view(job: FineTuningJob, training: Sequence[TrainingEvent]) -> list[dict[str, Any]]:
    """What of a job can be asked: the version that it published."""
    if job.version is None:
        return []
    steps = [event for event in training if isinstance(event, AdapterStep)]
    held_out = [event for event in training if isinstance(event, AdapterEvaluated)]
    step = steps[-1].step if steps else 0
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
                "train_loss": _number(steps[-1].loss) if steps else None,
                "full_valid_loss": _number(held_out[-1].loss) if held_out else None,
            },
        }
    ]


def _training_event(job: FineTuningJob, event: TrainingEvent) -> tuple[float, dict[str, Any]]:
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
    return _event(seed, event.at_s, describe(event), level=level, data=data)


def _event(
    seed: bytes, at_s: float, message: str, *, level: str, data: dict[str, Any] | None = None
) -> tuple[float, dict[str, Any]]:
    """With its exact time. What it is made of gives it its id, so that it has the same one in every page."""
    return at_s, {
        "id": f"ftevent-{sha256_hex(seed)[:_ID_DIGITS]}",
        "object": "fine_tuning.job.event",
        "created_at": int(at_s),
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
