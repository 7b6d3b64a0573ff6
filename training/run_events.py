"""What is told of an adapter in training, from its run."""

from __future__ import annotations

from training.adapter_run import AdapterRun
from training.events import AdapterStarted, AdapterStep


def started(run: AdapterRun) -> AdapterStarted:
    return AdapterStarted(
        adapter=run.name,
        family=run.spec.family,
        rank=run.spec.rank,
        step=run.step,
        steps=run.num_steps,
        sequences=len(run.data.training),
        truncated=run.data.truncated,
        dropped=run.data.dropped,
    )


def stepped(
    run: AdapterRun, *, gradient_norm: float, learning_rate: float, tokens: int, seconds: float
) -> AdapterStep:
    """Of the step that was its last so far.

    Args:
        tokens: its own.
        seconds: of the whole step, that of all its adapters.
    """
    return AdapterStep(
        adapter=run.name,
        step=run.step,
        steps=run.num_steps,
        loss=run.loss,
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
        tokens_per_s=tokens / seconds,
        tokens=tokens,
    )
