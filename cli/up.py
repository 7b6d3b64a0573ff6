"""`flora up` and `flora down`: a whole cluster on this machine, in the background."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.bases import BUILT_IN
from cli.console import AsJson, err, out, print_json
from cli.errors import CommandFailedError
from cli.interrupts import shielded
from cli.replicas import ReplicaRange, ReplicasOption
from cli.running import find_running
from cli.serving import local_settings, start_serving
from cli.settings import Config, RegistryOption, S3Endpoint


def up(
    base: Annotated[
        str | None, typer.Option(help=f"Base model: a name, hub id or directory. ({BUILT_IN})")
    ] = None,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    replicas: ReplicasOption = None,
    port: Annotated[int | None, typer.Option(min=0, help="Of the HTTP API. (8000)")] = None,
    bank_rows: Annotated[
        int | None, typer.Option(min=1, help="Adapter rows a replica holds on its device. (256)")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Start a cluster here: a private Ray, the registry and the HTTP API. Returns when it answers.

    Example: [bold]flora up --replicas 1..4 --port 8000[/]
    """
    if (running := find_running()) is not None:
        raise CommandFailedError(
            f"a cluster is running here already ({running.url or 'still starting'}); end it with: flora down"
        )
    settings = local_settings(
        config,
        base=base,
        replicas=replicas,
        storage={"registry": registry, "s3_endpoint_url": s3_endpoint},
        engine={"bank_rows": bank_rows},
        serve={"port": port},
    )
    with err.status("starting") as progress:
        running = start_serving(settings, report=progress.update)
    if as_json:
        print_json(
            {
                "url": running.url,
                "base": settings.engine.base_id,
                "pid": running.ray.pid,
                "replicas": {
                    "min": settings.serve.min_replicas,
                    "max": settings.serve.max_replicas,
                },
                "environment": running.ray.environment,
            }
        )
        return
    out.print(
        f"[bold green]Ready[/] at {running.url}/v1, answering as [bold]{settings.engine.base_id}[/]"
    )
    serve = settings.serve
    number = ReplicaRange(serve.min_replicas, serve.max_replicas)
    follows = "" if number.is_fixed else ", as many as the load needs"
    out.print(f"replicas   {number}{follows}")
    out.print(f"registry   {settings.storage.registry}", soft_wrap=True)
    out.print(f"dashboard  {running.ray.dashboard_url}")
    variables = " ".join(f"{name}={value}" for name, value in running.ray.environment.items())
    out.print(f"[dim]for Ray's own commands: export {variables}[/]", soft_wrap=True)
    out.print(
        f"\nTry next:\n  flora chat {settings.engine.base_id}\n"
        "  flora train examples/demo.yaml\n  flora status\n  flora down"
    )


def down(as_json: AsJson = False) -> None:
    """End the cluster of `flora up`, with everything it started.

    Example: [bold]flora down[/]
    """
    running = find_running()
    if running is not None:
        with err.status("stopping"), shielded():
            running.stop()
    if as_json:
        print_json({"stopped": running is not None})
    else:
        out.print("stopped" if running else "no cluster is running here")
