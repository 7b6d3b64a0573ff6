"""`flora adapters ls` and `show`: what the registry has, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from cli.console import AsJson, err, format_bytes, out, print_json, short
from cli.settings import Name, RegistryOption, S3Endpoint, Tenant, storage_settings
from storage.errors import UnknownModelError
from storage.identity import DEFAULT_TENANT, AdapterName, AdapterVersion
from storage.index_entry import AdapterEntry
from storage.manifest import Manifest
from storage.registry import Registry
from storage.stores import open_store


def ls(
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    after: Annotated[str | None, typer.Option(help="Only names that come after this one.")] = None,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters, in order of their names.

    Example: [bold]flora adapters ls --limit 50 --after captain[/]
    """
    store = Registry(open_store(storage_settings(registry, s3_endpoint)))
    # One more than is shown tells whether there is more.
    last = None if after is None else AdapterName(tenant, after)
    listed = store.list(tenant, limit=None if limit is None else limit + 1, after=last)
    bad = store.index().quarantined
    found = [_listed(name, entry, bad) for name, entry in listed.items()]
    has_more = limit is not None and len(found) > limit
    found = found[:limit]
    if as_json:
        print_json(found)
        return
    if not found:
        out.print("no adapters yet: flora train examples/demo.yaml" if after is None else "no more")
        return
    table = Table(_whole("adapter"), "aliases", "versions", "family", "rank", "size", "pinned")
    for adapter in found:
        newest = adapter["versions"][-1]
        table.add_row(
            adapter["name"],
            _aliases(adapter["aliases"], bad),
            str(len(adapter["versions"])),
            newest["family"],
            str(newest["rank"]),
            format_bytes(newest["num_bytes"]),
            str(adapter["pinned_copies"] or ""),
        )
    out.print(table)
    if has_more:
        err.print(f"There are more: flora adapters ls --limit {limit} --after {found[-1]['name']}")


def show(
    name: Name,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show every version of an adapter, oldest first, and what its aliases meant before.

    Example: [bold]flora adapters show captain[/]
    """
    store = Registry(open_store(storage_settings(registry, s3_endpoint)))
    adapter = AdapterName(tenant, name)
    manifests, aliases = store.versions(adapter), store.aliases(adapter)
    if not manifests:
        raise UnknownModelError(f"the adapter {name!r} does not exist", param="name")
    bad, pinned = store.quarantined(), store.pinned_copies(adapter)
    if as_json:
        print_json(
            {
                "name": name,
                "tenant": tenant,
                "aliases": {alias: record.version for alias, record in sorted(aliases.items())},
                "history": {
                    alias: [move.model_dump() for move in record.moves]
                    for alias, record in sorted(aliases.items())
                },
                "pinned_copies": pinned,
                "versions": [described(manifest, bad) for manifest in manifests],
            }
        )
        return
    table = Table(_whole("version"), "aliases", "family", "rank", "modules", "size", "made", "from")
    for manifest in manifests:
        version = described(manifest, bad)
        names = [alias for alias, record in aliases.items() if record.version == manifest.version]
        table.add_row(
            short(manifest.version),
            ", ".join(sorted(names)),
            version["family"],
            str(version["rank"]),
            str(version["modules"]),
            format_bytes(version["num_bytes"]),
            f"{datetime.fromtimestamp(version['created_s']):%Y-%m-%d %H:%M}",
            escape(version["source"]),
        )
    out.print(table)
    for alias, record in sorted(aliases.items()):
        before = " ← ".join(short(move.version) for move in record.moves)
        out.print(f"{alias}: {before}  ({record.generation} move(s))", soft_wrap=True)
    if pinned:
        out.print(f"pinned: {pinned} replica(s) hold it whatever is asked for")
    for manifest in manifests:
        if manifest.version in bad:
            err.print(
                f"[bold red]In quarantine:[/] {short(manifest.version)}: "
                + escape(bad[manifest.version]),
                soft_wrap=True,
            )


def described(manifest: Manifest, bad: Mapping[AdapterVersion, str]) -> dict[str, Any]:
    """One version as `--json` tells it; `bad` are those in quarantine, and why."""
    return {
        "version": manifest.version,
        "family": manifest.content.family,
        "rank": manifest.content.max_rank,
        "modules": len(manifest.content.ranks),
        "num_bytes": manifest.content.num_bytes,
        "created_s": manifest.provenance.created_s,
        "source": manifest.provenance.source,
        "base": manifest.provenance.base_name,
        "quarantined": bad.get(manifest.version),
    }


def _listed(
    name: AdapterName, entry: AdapterEntry, bad: Mapping[AdapterVersion, str]
) -> dict[str, Any]:
    return {
        "name": name.name,
        "tenant": name.tenant,
        "aliases": {alias: meant.version for alias, meant in sorted(entry.aliases.items())},
        "pinned_copies": entry.pinned_copies,
        "versions": [
            {
                "version": summary.version,
                "family": summary.family,
                "rank": summary.rank,
                "num_bytes": summary.num_bytes,
                "created_s": summary.created_s,
                "source": summary.source,
                "base": summary.base_name,
                "quarantined": bad.get(summary.version),
            }
            for summary in entry.versions
        ],
    }


def _whole(header: str) -> Column:
    """A column that a narrow terminal may not cut: what is in it is typed into the next command."""
    return Column(header, no_wrap=True)


def _aliases(aliases: Mapping[str, AdapterVersion], bad: Mapping[AdapterVersion, str]) -> str:
    return "\n".join(
        f"{alias} → {short(version)}" + " [red](quarantined)[/]" * (version in bad)
        for alias, version in aliases.items()
    )
