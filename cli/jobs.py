"""`flora jobs`: training jobs, and those of the fine-tuning API, as the registry's store tells them.

Works without a cluster, also long after a job's own is gone; only cancelling needs the one that the job runs on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from cli.adapter_outcomes import outcome_table
from cli.console import AsJson, out, print_json
from cli.job_views import (
    adapter_values,
    coloured,
    fine_tuning_row,
    fine_tuning_values,
    local_time,
    loss_of_driver,
    silence,
    standing,
    training_row,
)
from cli.running import find_running
from cli.settings import RegistryOption, S3Endpoint, command_settings
from cli.training_job import job_backend, tell_it_goes_on
from deployments.settings import Settings
from storage.errors import NotFoundError
from storage.object_store import ObjectStore
from storage.stores import open_store, open_store_to_read
from training.event_text import describe
from training.events import TrainingEvent, event_line
from training.job_reports import JobReport, cancel_job, exists, newest_jobs, report
from training.job_store import JobStore
from training.learning_curve import Curve, curves_of, plot
from training.service.job import FineTuningJob
from training.service.records import JobRecords

app = typer.Typer(
    help="Training jobs: what runs, what became of them, and why.", no_args_is_help=True
)

JobId = Annotated[str, typer.Argument(help="A training job's id, or a fine-tuning job's.")]

_POLL_S = 1.0


@app.command()
def ls(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs, newest first; those of the fine-tuning API by their own ids.

    Example: [bold]flora jobs ls --limit 5[/]
    """
    store = open_store_to_read(_settings(registry, s3_endpoint).storage)
    asked = JobRecords(store).newest(limit)
    batches = {job.batch for job in asked}
    rows = [fine_tuning_row(job) for job in asked]
    rows += [
        training_row(one)
        for one in newest_jobs(store, limit + len(batches))
        if one.job_id not in batches
    ]
    rows = sorted(rows, key=lambda row: -row["began_s"])[:limit]
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("no training jobs yet: flora train examples/demo.yaml")
        return
    table = Table(Column("job", no_wrap=True), "status", "adapters", "began")
    for row in rows:
        names = ", ".join(row["adapters"][:4]) + (" …" if len(row["adapters"]) > 4 else "")
        table.add_row(
            row["job"],
            coloured(row["status"]) + silence(row),
            escape(names),
            local_time(row["began_s"]),
        )
    out.print(table)


@app.command()
def show(
    job: JobId,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, help="Draw its losses so far there."),
    ] = None,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job made, adapter by adapter, with the course of its losses.

    Example: [bold]flora jobs show demo-20260101-120000-3f2a9c --picture loss.png[/]
    """
    store = open_store_to_read(_settings(registry, s3_endpoint).storage)
    found = _find(store, job)
    events = found.events(store)
    told = report(found.training_job or job, events)
    if found.training_job is not None:
        told = replace(told, alive_s=JobStore(store, found.training_job).alive_s())
    if picture is not None:
        picture.write_bytes(plot(curves_of(events), job))
    curves = {curve.adapter: curve for curve in curves_of(events)}
    names = told.adapters if found.asked is None else (found.asked.name,)
    adapters = [adapter_values(name, told, curves.get(name, Curve(name))) for name in names]
    values: dict[str, Any] = {
        "job": job,
        "status": standing(told),
        "error": told.error or loss_of_driver(told) or None,
        "began_s": told.began_s,
        "told_s": told.told_s,
        "adapters": adapters,
    }
    if found.asked is not None:
        values |= fine_tuning_values(found.asked)
    if as_json:
        print_json(values)
        return
    out.print(f"[bold]{escape(job)}[/]  {coloured(values['status'])}", soft_wrap=True)
    for name in ("training_job", "base", "tenant", "error"):
        if values.get(name):
            out.print(f"{name.replace('_', ' ')}: {escape(str(values[name]))}", soft_wrap=True)
    out.print(
        f"began {local_time(values['began_s'])}, last heard of {local_time(values['told_s'])}"
    )
    shown = [curves.get(name, Curve(name)) for name in names]
    out.print(outcome_table(shown, told.published, told.failed))


@app.command()
def logs(
    job: JobId,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on until the job ends; Ctrl-C leaves it alone."),
    ] = False,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Print what a job told, every step with its loss; of a fine-tuning job only what is its own.

    Example: [bold]flora jobs logs demo-20260101-120000-3f2a9c --follow[/]
    """
    store = open_store_to_read(_settings(registry, s3_endpoint).storage)
    found = _find(store, job)
    if as_json:
        print_json([json.loads(event_line(event)) for event in found.events(store)])
        return
    try:
        for event in _told(store, job, follow):
            who = getattr(event, "adapter", "")
            typer.echo(f"{local_time(event.at_s)}  {who:<12}  {describe(event)}")
    except KeyboardInterrupt:
        if not follow:
            raise
        tell_it_goes_on(job)


@app.command()
def cancel(
    job: JobId,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job. Of several fine-tuning jobs that train together, the others go on.

    Example: [bold]flora jobs cancel ftjob-199c82cc4003b1f0e7a2d96[/]
    """
    settings = _settings(registry, s3_endpoint)
    store = open_store(settings.storage)
    found = _find(store, job)
    if found.asked is not None:
        records = JobRecords(store)
        changed = records.change(found.asked, lambda current: current.cancelled(time.time()))
        status = changed.status.value
        if changed.batch is not None and status == "cancelled":
            # For a desk that is not there to do it.
            JobStore(store, changed.batch).stop(changed.name)
    else:
        running = find_running()
        backend = job_backend(running.ray if running else None, settings)
        status = cancel_job(backend, store, job).status.value
    if as_json:
        print_json({"job": job, "status": status})
    else:
        out.print(f"{escape(job)}  {coloured(status)}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Found:
    """`asked` is a job of the API; its training job may be another job's too, or not begun yet."""

    training_job: str | None
    asked: FineTuningJob | None = None

    def events(self, store: ObjectStore) -> tuple[TrainingEvent, ...]:
        if self.training_job is None:
            return ()
        told = JobStore(store, self.training_job).read_events().events
        return tuple(event for event in told if self.is_about(event))

    def is_about(self, event: TrainingEvent) -> bool:
        return self.asked is None or getattr(event, "adapter", None) == self.asked.name


def _find(store: ObjectStore, job_id: str) -> _Found:
    """Raises NotFoundError."""
    asked = JobRecords(store).find(job_id)
    if asked is not None:
        return _Found(asked.batch, asked)
    if not exists(store, job_id):
        raise NotFoundError(f"there is no training job {job_id!r}; see: flora jobs ls", param="job")
    return _Found(job_id)


def _told(store: ObjectStore, job_id: str, follow: bool) -> Iterator[TrainingEvent]:
    """The events so far, and with `follow` those that come, until the job ends."""
    cursor, read = "", ""
    told = JobReport(job_id)
    while True:
        found = _find(store, job_id)
        is_over = found.asked is not None and found.asked.status.is_final
        if found.training_job is not None:
            if found.training_job != read:  # a fine-tuning job may change its batch
                cursor, read = "", found.training_job
            page = JobStore(store, found.training_job).read_events(cursor)
            cursor = page.next
            for event in page.events:
                told = told.after(event)
                if found.is_about(event):
                    yield event
        if not follow or is_over or told.status.is_final:
            return
        time.sleep(_POLL_S)


def _settings(registry: str | None, s3_endpoint: str | None) -> Settings:
    running = find_running()
    if running is not None and registry is None and s3_endpoint is None:
        return Settings(**running.settings)
    return command_settings(storage={"registry": registry, "s3_endpoint_url": s3_endpoint})
