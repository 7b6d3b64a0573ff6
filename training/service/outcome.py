"""What the events of a training job say became of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.events import (
    AdapterFailed,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobFailed,
    JobStarted,
    TrainingEvent,
)


@dataclass
class Outcome:
    """Takes events in, in their order. What was told last of an adapter holds: a job may be resumed.

    Attributes:
        started: adapters that have begun to train.
        published: adapter → version.
        failed: adapter → reason.
        failure: why the last attempt did not, if it could say so.
    """

    started: set[str] = field(default_factory=set)
    published: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    _tokens: dict[str, dict[int, int]] = field(default_factory=dict)

    def see(self, event: TrainingEvent) -> None:
        match event:
            case JobStarted():
                self.failure = None
            case AdapterStarted():
                self.started.add(event.adapter)
            case AdapterStep():
                # A step that is told again, after a resume, replaces the earlier one.
                self._tokens.setdefault(event.adapter, {})[event.step] = event.tokens
            case AdapterPublished():
                self.published[event.adapter] = event.version
                self.failed.pop(event.adapter, None)
            case AdapterFailed():
                self.failed[event.adapter] = event.reason
                self.published.pop(event.adapter, None)
            case JobFailed() if not event.is_taken_over:
                self.failure = event.reason

    def tokens(self, adapter: str) -> int:
        """That it was trained on so far, each as often as it came."""
        return sum(self._tokens.get(adapter, {}).values())
