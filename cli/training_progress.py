"""A training job as it goes, on the terminal: one bar for each adapter, with its loss."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from cli.console import short
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterFinished,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobFailed,
    JobFinished,
    JobStarted,
    TrainingEvent,
)
from training.learning_curve import Curve, CurveBook


class TrainingProgress:
    """Shows events, one after another. Remembers what became of each adapter.

    Attributes:
        published: adapter → version, of those that are done.
        failed: adapter → reason.
        is_over: the job told its end.
        failure: why the job as a whole did not run to its end, if so.
    """

    def __init__(self, console: Console) -> None:
        self.published: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.is_over = False
        self.failure: str | None = None
        self._console = console
        self._book = CurveBook()
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[loss]:<11}"),
            TextColumn("{task.fields[held_out]}"),
            # What a narrow terminal folds, so that the figures stay whole.
            TextColumn("{task.fields[state]}", table_column=Column(overflow="fold")),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, event: TrainingEvent) -> None:
        """Take in one event. A repeated step, after a resume, replaces the earlier one."""
        self._book.add(event)
        match event:
            case JobStarted():
                for adapter in event.adapters:
                    self._task(adapter)
            case AdapterStarted():
                state = f"[dim]{event.family}, rank {event.rank}[/]"
                self._update(event.adapter, total=event.steps, completed=event.step, state=state)
            case AdapterStep():
                self._update(event.adapter, completed=event.step, loss=f"loss {event.loss:.4f}")
            case AdapterEvaluated():
                self._update(event.adapter, held_out=f"held out {event.loss:.4f}")
            case AdapterFinished():
                self._update(event.adapter, state=f"{event.reason}; publishing")
            case AdapterPublished():
                self.published[event.adapter] = event.version
                state = f"[green]published[/] {short(event.version)}@{event.alias}"
                self._update(event.adapter, state=state)
                self._tell(f"{event.adapter}: published as {event.version}")
            case AdapterFailed():
                self.failed[event.adapter] = event.reason
                self._update(event.adapter, state=f"[red]{event.reason}[/]")
                self._tell(f"{event.adapter}: failed at step {event.step}: {event.reason}")
            case JobFinished():
                self.is_over = True
            case JobFailed() if not event.is_taken_over:
                self.is_over = True
                self.failure = event.reason

    @property
    def curves(self) -> tuple[Curve, ...]:
        """The losses so far, in the order in which the job named its adapters."""
        return self._book.curves

    def _task(self, adapter: str) -> TaskID:
        if adapter not in self._tasks:
            self._tasks[adapter] = self._bars.add_task(
                adapter, total=None, loss="", held_out="", state="waiting"
            )
        return self._tasks[adapter]

    def _update(self, adapter: str, **fields: object) -> None:
        self._bars.update(self._task(adapter), **fields)  # type: ignore[arg-type]

    def _tell(self, line: str) -> None:
        """Where there is no terminal there are no bars; a log still hears of what matters."""
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)
