"""`flora status`: which replica holds which adapter, and where."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from cli.client import ApiClient, Url
from cli.console import AsJson, out, print_json, short

_REFRESH_S = 1.0
_TIERS = ("device", "host", "disk")
_STYLES = {"device": "bold green", "host": "yellow", "disk": "blue", "·": "dim"}


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show replicas by adapters by tiers: device (ready), host and disk (near), · (in the registry only).

    Example: [bold]flora status --watch[/]
    """
    client = ApiClient(url)
    if as_json:
        print_json(_read(client))
    elif watch:
        with suppress(KeyboardInterrupt), Live(console=out, auto_refresh=False) as live:
            while True:
                live.update(cluster_view(**_read(client)), refresh=True)
                time.sleep(_REFRESH_S)
    else:
        out.print(cluster_view(**_read(client)))


def cluster_view(
    cluster: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]
) -> RenderableType:
    """The answers of `/v1/cluster` and `/v1/adapters` as two tables."""
    parts: list[RenderableType] = [
        f"base [bold]{cluster['base']}[/] · placement epoch {cluster['epoch']}",
        _replicas(cluster["replicas"]),
        _residency(cluster["replicas"], adapters),
    ]
    if cluster["registry_error"]:
        parts.append(f"[red]The registry cannot be read:[/] {cluster['registry_error']}")
    return Group(*(Text.from_markup(part) if isinstance(part, str) else part for part in parts))


def replica_names(replicas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Replica id → what people read instead: r1, r2, … in the order of the ids."""
    ids = sorted(replica["id"] for replica in replicas)
    return {replica_id: f"r{number}" for number, replica_id in enumerate(ids, start=1)}


def tier_on(replica: Mapping[str, Any], version: str) -> str:
    """The nearest place on a replica where a version lies; `·` when only the registry has it."""
    return next((tier for tier in _TIERS if version in replica[tier]), "·")


def _read(client: ApiClient) -> dict[str, Any]:
    return {"cluster": client.get("/v1/cluster"), "adapters": client.get("/v1/adapters")["data"]}


def _replicas(replicas: Sequence[Mapping[str, Any]]) -> Table:
    names = replica_names(replicas)
    table = Table("replica", "rows", "running", "waiting", "loads", "evictions", "tokens out", "id")
    for replica in sorted(replicas, key=lambda one: str(one["id"])):
        table.add_row(
            names[replica["id"]],
            f"{replica['rows_used']}/{replica['rows']}",
            *(str(replica[key]) for key in ("running", "waiting", "loads", "evictions")),
            f"{replica['tokens_out']:,}",
            str(replica["id"]),
        )
    return table


def _residency(
    replicas: Sequence[Mapping[str, Any]], adapters: Sequence[Mapping[str, Any]]
) -> Table:
    names = replica_names(replicas)
    table = Table("adapter", Column("version", no_wrap=True), "rank", *names.values())
    by_id = {replica["id"]: replica for replica in replicas}
    for adapter in adapters:
        for version in _shown(adapter, replicas):
            aliases = [
                alias for alias, of in adapter["serving"].items() if of == version["version"]
            ]
            tiers = [tier_on(by_id[replica_id], version["version"]) for replica_id in names]
            table.add_row(
                f"{adapter['id']}{''.join(f'@{alias}' for alias in aliases)}",
                short(version["version"]),
                str(version["rank"]),
                *(Text(tier, _STYLES[tier]) for tier in tiers),
            )
    return table


def _shown(
    adapter: Mapping[str, Any], replicas: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The versions an alias serves or a replica still has near; old ones in the registry alone are left out."""
    return [
        version
        for version in adapter["versions"]
        if version["version"] in adapter["serving"].values()
        or any(tier_on(replica, version["version"]) in ("device", "host") for replica in replicas)
    ]
