"""Training jobs, and those of the fine-tuning API, as `flora jobs` shows them: values for JSON, and words."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from training.job_reports import JobReport
from training.learning_curve import Curve, sparkline
from training.service.job import FineTuningJob

_SILENT_S = 600.0
"""Of a job whose driver gives no signs of life. What runs and told nothing for so long is said to be silent."""
_LOST = "lost"
_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    _LOST: "red",
}


def training_row(told: JobReport) -> dict[str, Any]:
    return {
        "job": told.job_id,
        "status": standing(told),
        "adapters": list(told.adapters),
        "began_s": told.began_s,
        "told_s": told.told_s,
    }


def fine_tuning_row(job: FineTuningJob) -> dict[str, Any]:
    return {
        "job": job.job_id,
        "status": job.status.value,
        "adapters": [job.name],
        "began_s": job.created_s,
        "told_s": None,
    }


def fine_tuning_values(job: FineTuningJob) -> dict[str, Any]:
    """What a record knows better than the events, which a batch shares."""
    return {
        "status": job.status.value,
        "error": None if job.fault is None else job.fault.message,
        "began_s": job.created_s,
        "told_s": job.notes[-1].at_s,
        "training_job": job.batch,
        "base": job.request.base_id,
        "tenant": job.request.tenant,
        "notes": [note.model_dump() for note in job.notes],
    }


def adapter_values(name: str, told: JobReport, curve: Curve) -> dict[str, Any]:
    losses = curve.losses
    return {
        "adapter": name,
        "steps": curve.training[-1][0] if curve.training else 0,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out_loss": curve.held_out[-1][1] if curve.held_out else None,
        "curve": sparkline(curve),
        "version": told.published.get(name),
        "failed": told.failed.get(name),
    }


def coloured(status: str) -> str:
    colour = _COLOURS.get(status)
    return status if colour is None else f"[{colour}]{status}[/]"


def standing(told: JobReport) -> str:
    return _LOST if told.lost_for_s(time.time()) else told.status.value


def loss_of_driver(told: JobReport) -> str:
    lost_s = told.lost_for_s(time.time())
    if not lost_s:
        return ""
    return (
        f"there was no sign of its driver for {lost_s / 60:.0f} min: its Ray, its machine or its terminal is gone; "
        "what it published stays"
    )


def silence(row: dict[str, Any]) -> str:
    if row["status"] not in ("running", _LOST) or row["told_s"] is None:
        return ""
    silent_s = time.time() - row["told_s"]
    if row["status"] == _LOST:
        return f" [dim](no sign for {silent_s / 60:.0f} min)[/]"
    return f" [dim](silent for {silent_s / 60:.0f} min)[/]" if silent_s > _SILENT_S else ""


def local_time(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s):%Y-%m-%d %H:%M:%S}" if at_s else ""
