"""`flora train`: many adapters in one job, followed as they learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.adapter_outcomes import outcome_table
from cli.bases import find_base
from cli.console import AsJson, err, out, print_json
from cli.errors import EXIT_FAILED
from cli.interrupts import shielded
from cli.local_cluster import LocalCluster, start_cluster
from cli.running import find_running
from cli.settings import RegistryOption, S3Endpoint, command_settings
from cli.training_job import TrainingResult, cancel, follow, job_backend, submit, tell_it_goes_on
from deployments.settings import Settings
from storage.config import StorageSettings
from storage.errors import InvalidRequestError
from training.backends import runs_elsewhere
from training.spec import TrainingSpec


def train(
    spec: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="The job's specification.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Start the job and return; needs `flora up`.")
    ] = False,
    attach: Annotated[
        str | None, typer.Option(help="Follow a job that is running; Ctrl-C leaves it alone.")
    ] = None,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Train adapters on the cluster of `flora up`, or on a private Ray for this one job. Ctrl-C cancels the job.

    Example: [bold]flora train examples/demo.yaml[/]
    """
    running = find_running()
    if (spec is None) == (attach is None):
        raise InvalidRequestError("give a specification, or --attach with a job's id")
    settings = _settings(registry, s3_endpoint)
    is_kept = running is not None or runs_elsewhere(settings)
    if (detach or attach is not None) and not is_kept:
        raise InvalidRequestError("no cluster is running here to keep the job; start one: flora up")
    checked = None if spec is None else read_specification(spec, storage=settings.storage)
    if checked is not None and not runs_elsewhere(settings):
        _check_base(checked, settings.storage)
    with _ray(running.ray if running else None, is_needed=not is_kept) as ray:
        if checked is None:
            assert attach is not None
            try:
                result = follow(job_backend(ray, settings), settings, attach)
            except KeyboardInterrupt:
                tell_it_goes_on(attach)
                raise
        else:
            assert spec is not None
            job_id = _new_job_id(spec)
            backend = submit(checked, ray, settings, job_id)
            if detach:
                _tell_detached(job_id, as_json)
                return
            try:
                result = follow(backend, settings, job_id)
            except KeyboardInterrupt:
                cancel(backend, settings, job_id)
                raise
    _tell(result, as_json, is_served=running is not None)
    if result.failed:
        raise typer.Exit(EXIT_FAILED)


def read_specification(
    path: Path, base: Path | None = None, storage: StorageSettings | None = None
) -> TrainingSpec:
    """A checked specification, on `base`; or else on its own, which is looked for among the bases here too.

    Args:
        storage: how data in S3 is reached.

    Raises:
        SpecificationError: names the file, the line and the field.
    """
    from training.spec_file import read_spec

    if base is None:
        spec = read_spec(path, storage=storage)
        base = find_base(spec.base) or find_base(Path(spec.base).name)
        if base is None:
            return spec
    return read_spec(path, {"base": str(base)}, storage)


def _check_base(spec: TrainingSpec, storage: StorageSettings) -> None:
    """Refuses what the job would refuse, before anything is started for it."""
    from training.job_plan import check_base

    with err.status("looking at the base model"):
        check_base(spec, storage)


def _settings(registry: str | None, s3_endpoint: str | None) -> Settings:
    running = find_running()
    if running is not None and registry is None and s3_endpoint is None:
        return Settings(**running.settings)
    return command_settings(storage={"registry": registry, "s3_endpoint_url": s3_endpoint})


@contextmanager
def _ray(shared: LocalCluster | None, *, is_needed: bool) -> Iterator[LocalCluster | None]:
    """The Ray there is on this machine, else a private one if jobs need it."""
    if not is_needed:
        yield shared
        return
    with err.status("starting a private Ray"):
        private = start_cluster()
    try:
        yield private
    finally:
        with shielded():
            private.stop()


def _new_job_id(spec: Path) -> str:
    from training.job import new_job_id

    return new_job_id(str(spec))


def _tell_detached(job_id: str, as_json: bool) -> None:
    if as_json:
        print_json({"job_id": job_id})
    else:
        out.print(
            f"started {job_id}; follow it with: flora train --attach {job_id}", soft_wrap=True
        )


def _tell(result: TrainingResult, as_json: bool, is_served: bool) -> None:
    if as_json:
        print_json(
            {
                "job_id": result.job_id,
                "seconds": round(result.seconds, 1),
                "published": result.published,
                "failed": result.failed,
                "last_loss": {
                    curve.adapter: curve.losses[-1] for curve in result.curves if curve.losses
                },
                "held_out_loss": {
                    curve.adapter: curve.held_out[-1][1]
                    for curve in result.curves
                    if curve.held_out
                },
            }
        )
        return
    out.print(outcome_table(result.curves, result.published, result.failed))
    out.print(
        f"{result.seconds:.0f} s · job {result.job_id}\n"
        f"Its losses as a picture:\n  flora jobs show {result.job_id} --picture loss.png",
        soft_wrap=True,
    )
    if is_served and result.published:
        out.print(f"Try next:\n  flora chat {next(iter(result.published))}")
