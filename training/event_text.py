"""Events of training jobs in words, as logs and the API tell them."""

from __future__ import annotations

from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterFinished,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobStarted,
    RoundFinished,
    TrainingEvent,
    WorkerStarted,
)


def describe(event: TrainingEvent) -> str:
    """One line, without the name of the adapter that it is about."""
    match event:
        case JobStarted():
            return f"the job began: {len(event.adapters)} adapters on {event.workers} workers"
        case WorkerStarted():
            return f"worker {event.worker} trains {', '.join(event.adapters) or 'nothing'}"
        case RoundFinished():
            return f"round {event.round} is saved"
        case AdapterStarted():
            return (
                f"training from step {event.step} of {event.steps}: {event.family} of rank {event.rank}, "
                f"{event.sequences} examples ({event.truncated} cut, {event.dropped} left out)"
            )
        case AdapterStep():
            return f"Step {event.step}/{event.steps}: training loss={event.loss:.4f}"
        case AdapterEvaluated():
            return f"Step {event.step}: validation loss={event.loss:.4f}"
        case AdapterFinished():
            return f"finished at step {event.step}: {event.reason}"
        case AdapterPublished():
            return f"published as {event.alias}, version {event.version}"
        case AdapterFailed():
            return f"stopped at step {event.step}: {event.reason}"
        case JobFinished():
            return f"the job ended: {len(event.published)} published, {len(event.failed)} failed"
        case JobFailed():
            return event.reason if event.is_taken_over else f"the job failed: {event.reason}"
        case JobCancelled():
            return "the job was cancelled"
    return event.kind
