"""`flora status`: which replica holds which adapter, and where."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from cli.client import ApiClient, Url
from cli.console import AsJson, out, print_json, short

_REFRESH_S = 1.0
_TOP = 20
_LINES_AROUND = 16
"""Of a terminal: what is not a row of adapters."""
_MOVES_SHOWN = 5
_TIERS = {
    "device": ("●", "bold green"),
    "host": ("◐", "yellow"),
    "disk": ("○", "blue"),
    "registry": ("·", "dim"),
}


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="Every adapter; else those most asked for.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show replicas by adapters by tiers: ● on the device, ◐ in memory, ○ on disk, · in the registry only.

    Example: [bold]flora status --watch[/]
    """
    client = ApiClient(url)
    if as_json:
        cluster = _read(client, None)
        print_json({"adapters": cluster.pop("adapters"), "cluster": cluster})
    elif watch:
        with suppress(KeyboardInterrupt), Live(console=out, auto_refresh=False) as live:
            while True:
                top = None if show_all else max(1, out.height - _LINES_AROUND)
                live.update(cluster_view(_read(client, top), out.width), refresh=True)
                time.sleep(_REFRESH_S)
    else:
        out.print(cluster_view(_read(client, None if show_all else _TOP), out.width))


def cluster_view(cluster: Mapping[str, Any], width: int) -> RenderableType:
    """The answer of `/v1/cluster`, for a terminal so many columns wide."""
    replicas = sorted(cluster["replicas"], key=lambda one: str(one["id"]))
    adapters = cluster["adapters"]
    return Group(
        Text.from_markup(_headline(cluster)),
        "",
        _replicas(replicas, width),
        "",
        _residency(replicas, adapters, width) if adapters else "no adapters yet",
        "",
        *(Text.from_markup(line) for line in _footlines(cluster)),
    )


def replica_names(replicas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Replica id → what people read instead: r1, r2, … in the order of the ids."""
    ids = sorted(replica["id"] for replica in replicas)
    return {replica_id: f"r{number}" for number, replica_id in enumerate(ids, start=1)}


def _read(client: ApiClient, limit: int | None) -> dict[str, Any]:
    cluster: dict[str, Any] = client.get(
        "/v1/cluster" if limit is None else f"/v1/cluster?limit={limit}"
    )
    return cluster


def _headline(cluster: Mapping[str, Any]) -> str:
    least, most = cluster["replica_range"]["min"], cluster["replica_range"]["max"]
    count = len(cluster["replicas"])
    scaling = "" if least == most else f" of {least} to {most}"
    down = [one for one in cluster["replicas"] if not one["is_registry_up"]]
    registry = "registry [green]up[/]"
    if cluster["registry_error"]:
        registry = "registry [bold red]down[/]"
    elif down:
        registry = f"registry [bold red]down for {len(down)} of {count} replicas[/]"
    return (
        f"base [bold]{escape(cluster['base'])}[/] · {count} replica{'s' * (count != 1)}{scaling} · "
        f"placement epoch {cluster['epoch']} · {registry}"
    )


def _replicas(replicas: Sequence[Mapping[str, Any]], width: int) -> Table:
    names = replica_names(replicas)
    is_wide = width >= 100
    headers = ["rows", "running", "waiting", "KV", "loads", "evicted"]
    headers += ["misses", "load s", "tokens out", "threads"] * is_wide
    table = _plain("replica", *(Column(header, justify="right") for header in headers))
    if is_wide:
        table.add_column("id")
    for replica in replicas:
        cells = [
            names[replica["id"]],
            f"{replica['rows_used']}/{replica['rows']}",
            str(replica["running"]),
            str(replica["waiting"]),
            f"{replica['kv_used']:.0%}",
            f"{replica['loads']:,}",
            f"{replica['evictions']:,}",
        ]
        if is_wide:
            cells += [
                f"{replica['misses']:,}",
                f"{replica['load_s']:.2f}",
                f"{replica['tokens_out']:,}",
                str(replica["threads"]),
                escape(str(replica["id"])),
            ]
        table.add_row(*cells)
    return table


def _residency(
    replicas: Sequence[Mapping[str, Any]], adapters: Sequence[Mapping[str, Any]], width: int
) -> Table:
    names = replica_names(replicas)
    words = _has_room_for_words(names, width)
    table = _plain(
        Column("adapter", overflow="fold"),
        Column("version", no_wrap=True),
        Column("rank", justify="right"),
        Column("work/s", justify="right"),
        *names.values(),
    )
    tenants = {adapter["tenant"] for adapter in adapters}
    for adapter in adapters:
        shown = escape(adapter["id"] or "(no name)")
        if len(tenants) > 1 and adapter["tenant"]:
            shown = f"{escape(adapter['tenant'])}/{shown}"
        shown += "".join(f"[dim]@{escape(alias)}[/]" for alias in adapter["aliases"])
        shown += f" [magenta]pinned ×{adapter['pinned_copies']}[/]" * bool(adapter["pinned_copies"])
        shown += " [red]failed[/]" * bool(adapter["failed"])
        tiers = [adapter["tiers"].get(replica_id, "registry") for replica_id in names]
        table.add_row(
            shown,
            short(adapter["version"]),
            "" if adapter["rank"] is None else str(adapter["rank"]),
            f"{adapter['demand']:,.0f}" if adapter["demand"] >= 1 else "",
            *(_tier(tier, words) for tier in tiers),
        )
    return table


def _has_room_for_words(names: Mapping[str, str], width: int) -> bool:
    return width >= 70 + 9 * len(names)


def _tier(tier: str, words: bool) -> Text:
    sign, style = _TIERS[tier]
    return Text(f"{sign} {tier}" if words and tier != "registry" else sign, style)


def _footlines(cluster: Mapping[str, Any]) -> Iterator[str]:
    totals = cluster["totals"]
    hidden = totals["rows"] - len(cluster["adapters"])
    parts = [
        f"{totals[tier]:,} {text}"
        for tier, text in (
            ("device", "on a device"),
            ("host", "in memory"),
            ("disk", "on disk"),
            ("registry", "in the registry only"),
        )
    ]
    if hidden > 0:
        yield f"[dim]… {hidden:,} more (--all); of {totals['rows']:,} in all: {', '.join(parts)}[/]"
    lags = [
        f"{escape(adapter['id'])}@{escape(move['alias'])} serves {short(adapter['version'])}, not yet "
        f"{short(move['desired'])}: {escape(move['reason'])}"
        for adapter in cluster["adapters"]
        for move in adapter["moves"]
    ]
    yield from (f"[yellow]{line}[/]" for line in lags[:_MOVES_SHOWN])
    if len(cluster["moves"]) > min(len(lags), _MOVES_SHOWN):
        more = len(cluster["moves"]) - min(len(lags), _MOVES_SHOWN)
        yield f"[yellow]… {more} more aliases do not serve what they should[/]"
    failed = list(cluster["failed"].items())
    yield from (
        f"[red]{short(version)} cannot be served:[/] {escape(reason)}"
        for version, reason in failed[:_MOVES_SHOWN]
    )
    if len(failed) > _MOVES_SHOWN:
        yield f"[red]… {len(failed) - _MOVES_SHOWN} more versions cannot be served[/]"
    if cluster["no_room"] or cluster["too_large"]:
        yield (
            f"[yellow]asked for and without a planned place:[/] {len(cluster['no_room'])} for want of room, "
            f"{len(cluster['too_large'])} too large for every replica"
        )
    if cluster["registry_error"]:
        yield f"[red]The registry cannot be read:[/] {escape(cluster['registry_error'])}"


def _plain(*columns: str | Column) -> Table:
    """A table without lines between its cells, so that much fits into little."""
    return Table(*columns, box=SIMPLE_HEAD, padding=0, show_edge=False)
