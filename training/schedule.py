"""The learning rate of one adapter at one step."""

from __future__ import annotations

import math

from training.spec import AdapterSpec


def learning_rate(spec: AdapterSpec, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`: a linear warm-up from above 0, then the schedule down to 0."""
    assert spec.learning_rate is not None
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, num_steps - spec.warmup_steps)
    match spec.schedule:
        case "linear":
            return spec.learning_rate * (1 - done)
        case "cosine":
            return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "constant":
            return spec.learning_rate
