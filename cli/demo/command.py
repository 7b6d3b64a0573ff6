"""The `flora demo` command: sets the stage, tells the story, and leaves nothing running."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.bases import BUILT_IN
from cli.console import AsJson, err, out, print_json
from cli.demo.lessons import SPECIFICATION, read_lessons
from cli.demo.story import Story
from cli.errors import EXIT_FAILED
from cli.interrupts import shielded
from cli.local_cluster import LocalCluster, start_cluster
from cli.replicas import ReplicaRange
from cli.serving import local_settings, logical_cpus
from cli.settings import RegistryOption, S3Endpoint
from cli.train import read_specification
from deployments.settings import Settings

_REPLICAS = 2


def demo(
    spec: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="What to train.", show_default=False)
    ] = SPECIFICATION,
    base: Annotated[str, typer.Option(help="Base model: a name or a directory.")] = BUILT_IN,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Train adapters together, serve them beside the base from two replicas, and judge their answers.

    Exit code 1 when an adapter did not learn its lesson. Nothing is left running.

    Example: [bold]flora demo[/]
    """
    from training.job import new_job_id

    started_s = time.monotonic()
    console = err if as_json else out
    settings = local_settings(
        None,
        base=base,
        replicas=ReplicaRange(_REPLICAS, _REPLICAS),
        storage={"registry": registry, "s3_endpoint_url": s3_endpoint},
        serve={"port": 0},
    )
    specification = read_specification(spec, base=Path(settings.engine.base))
    lessons = read_lessons(specification)
    with _private_ray(settings) as ray:
        story = Story(ray, settings, console)
        job_id = new_job_id(str(spec))
        trained = story.train(specification, job_id)
        with story.serve(specification.tenant, trained.published) as service:
            moved = service.tour(lessons)
            service.compare(lessons)
            examination = service.examine(lessons)
    seconds = time.monotonic() - started_s
    if as_json:
        print_json({**story.record, "seconds": seconds, "holds": examination.holds and moved})
    else:
        _tell_the_end(console, settings, job_id, lessons[0].adapter, seconds)
    if not (examination.holds and moved):
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _private_ray(settings: Settings) -> Iterator[LocalCluster]:
    with err.status("starting a private Ray"):
        ray = start_cluster(num_cpus=logical_cpus(settings))
    try:
        yield ray
    finally:
        with shielded():
            ray.stop()


def _tell_the_end(
    console: Console, settings: Settings, job_id: str, adapter: str, seconds: float
) -> None:
    storage = settings.storage
    where = "" if storage.s3_endpoint_url is None else f" at {storage.s3_endpoint_url}"
    console.print(f"\n[bold]Done in {seconds:.0f} s; nothing is left running.[/] Where things lie:")
    for name, place in (
        ("base", settings.engine.base),
        ("adapters", f"{storage.registry}{where}"),
        ("training", f"{storage.registry}/jobs/{job_id}{where}"),
    ):
        console.print(f"  {name:<9} {place}", soft_wrap=True)
    flags = "".join(
        f" {flag} {value}"
        for flag, value in (
            ("--registry", storage.registry if storage.registry.startswith("s3://") else None),
            ("--s3-endpoint", storage.s3_endpoint_url),
        )
        if value is not None
    )
    console.print(
        f"Try next:\n  flora up --replicas 2{flags}\n  flora chat {adapter}\n"
        f"  flora adapters show {adapter}{flags}\n  flora down",
        soft_wrap=True,
    )
