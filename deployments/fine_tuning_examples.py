"""What /docs shows of the routes of files and fine-tuning: one example of each answer and of an upload."""

from __future__ import annotations

from typing import Any

_HYPERPARAMETERS = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
_FILE: dict[str, Any] = {
    "id": "file-3f2a9c41d07be5a81c9e44b0",
    "object": "file",
    "bytes": 48_213,
    "created_at": 1_760_000_000,
    "filename": "captain.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}
_JOB: dict[str, Any] = {
    "id": "ftjob-199c82cc4003b1f0e7a2d96",
    "object": "fine_tuning.job",
    "created_at": 1_760_000_100,
    "finished_at": 1_760_000_400,
    "status": "succeeded",
    "error": None,
    "model": "smollm2-135m-instruct",
    "fine_tuned_model": "captain",
    "trained_tokens": 61_440,
    "training_file": _FILE["id"],
    "validation_file": None,
    "hyperparameters": _HYPERPARAMETERS,
    "method": {"type": "supervised", "supervised": {"hyperparameters": _HYPERPARAMETERS}},
    "seed": 1_203_944,
    "metadata": None,
    "organization_id": "default",
    "result_files": [],
    "integrations": [],
    "estimated_finish": None,
    "user_provided_suffix": "captain",
    "adapter": {"name": "captain", "family": "flora", "rank": 4, "epochs": 3},
    "training_job": "ftbatch-199c82cd3895d07e1aa",
}
_EVENT: dict[str, Any] = {
    "id": "ftevent-0643d0a1f5c2805a81c9e44b",
    "object": "fine_tuning.job.event",
    "created_at": 1_760_000_150,
    "level": "info",
    "message": "Step 12/60: training loss=0.4100",
    "type": "metrics",
    "data": {"step": 12, "total_steps": 60, "train_loss": 0.41, "learning_rate": 0.008},
}
_CHECKPOINT: dict[str, Any] = {
    "id": "ftckpt-c41d07be5a81c9e44b03f2a9",
    "object": "fine_tuning.job.checkpoint",
    "created_at": 1_760_000_400,
    "fine_tuned_model_checkpoint": "captain@3f2a9c41d07b",
    "fine_tuning_job_id": _JOB["id"],
    "step_number": 60,
    "metrics": {"step": 60, "train_loss": 0.11, "full_valid_loss": None},
}


def _json(example: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"application/json": {"example": example}}}}


def _list(one: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    page = {"data": [one], "first_id": one["id"], "last_id": one["id"], "has_more": False}
    return _json({"object": "list", **page})


FILE = _json(_FILE)
FILES = _list(_FILE)
DELETED_FILE = _json({"id": _FILE["id"], "object": "file", "deleted": True})
JOB = _json(_JOB)
JOBS = _list(_JOB)
EVENTS = _list(_EVENT)
CHECKPOINTS = _list(_CHECKPOINT)

UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}
