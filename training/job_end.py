"""What is made of a job's events when it ends: who was published, who failed, and the picture of its losses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from training.events import AdapterFailed, AdapterPublished, TrainingEvent
from training.job_store import LOSS_PICTURE, JobStore
from training.learning_curve import curves_of, plot

logger = logging.getLogger("flora.training")


@dataclass(frozen=True)
class JobResult:
    """How a job ended: versions of what was published, reasons of what failed, by adapter.

    `error` says why the job as a whole stopped, if it did.
    """

    published: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_success(self) -> bool:
        return self.error is None and not self.failed


def job_result(events: Sequence[TrainingEvent], error: str | None) -> JobResult:
    """The events are the job's memory: what was told last of an adapter holds, also after a resume."""
    published: dict[str, str] = {}
    failed: dict[str, str] = {}
    for event in events:
        if isinstance(event, AdapterPublished):
            published[event.adapter] = event.version
            failed.pop(event.adapter, None)
        elif isinstance(event, AdapterFailed):
            failed[event.adapter] = event.reason
            published.pop(event.adapter, None)
    return JobResult(published, failed, error)


def keep_picture(job: JobStore, title: str, events: Sequence[TrainingEvent]) -> None:
    """Put the learning curves next to the events. No job fails for its picture."""
    try:
        job.put_file(LOSS_PICTURE, plot(curves_of(events), title))
    except Exception:
        logger.warning("there is no picture of the losses", exc_info=True)


def telling_line(text: str) -> str:
    """The line of an error, or of its traceback, that says what went wrong."""
    lines = text.strip().splitlines() or ["it gave no reason"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
