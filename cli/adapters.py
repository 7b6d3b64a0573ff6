"""`flora adapters`: the registry, by hand. Works with or without a running cluster; a running one follows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cli.bases import BUILT_IN
from cli.console import AsJson, err, format_bytes, out, print_json, short
from cli.running import find_running
from cli.settings import RegistryOption, S3Endpoint, base_directory, base_name, storage_settings
from storage.errors import UnknownModelError
from storage.identity import DEFAULT_ALIAS, DEFAULT_TENANT, AdapterName
from storage.manifest import AliasRecord, Manifest
from storage.registry import Registry
from storage.stores import open_store

app = typer.Typer(help="The adapters of the registry.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Tenant = Annotated[str, typer.Option(help="Whose adapters.")]


@app.command()
def ls(
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters.

    Example: [bold]flora adapters ls[/]
    """
    store = _open(registry, s3_endpoint)
    found = [
        _summary(name, store.versions(name), store.aliases(name)) for name in store.names(tenant)
    ]
    if as_json:
        print_json(found)
        return
    table = Table(_whole("adapter"), "aliases", "versions", "family", "rank", "size")
    for adapter in found:
        newest = adapter["versions"][-1]
        table.add_row(
            adapter["name"],
            _aliases(adapter["aliases"]),
            str(len(adapter["versions"])),
            newest["family"],
            str(newest["rank"]),
            format_bytes(newest["num_bytes"]),
        )
    out.print(table if found else "no adapters yet: flora train examples/demo.yaml")


@app.command()
def show(
    name: Name,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show every version of an adapter, oldest first.

    Example: [bold]flora adapters show captain[/]
    """
    store = _open(registry, s3_endpoint)
    adapter = AdapterName(tenant, name)
    found = _summary(adapter, store.versions(adapter), store.aliases(adapter))
    if not found["versions"]:
        raise UnknownModelError(f"the adapter {name!r} does not exist", param="name")
    if as_json:
        print_json(found)
        return
    table = Table(_whole("version"), "aliases", "family", "rank", "modules", "size", "made", "from")
    for version in found["versions"]:
        aliases = [alias for alias, of in found["aliases"].items() if of == version["version"]]
        table.add_row(
            short(version["version"]),
            ", ".join(aliases),
            version["family"],
            str(version["rank"]),
            str(version["modules"]),
            format_bytes(version["num_bytes"]),
            f"{datetime.fromtimestamp(version['created_s']):%Y-%m-%d %H:%M}",
            version["source"],
        )
    out.print(table)


@app.command()
def push(
    name: Name,
    directory: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="An adapter as PEFT saves it.")
    ],
    base: Annotated[
        str | None, typer.Option(help=f"The base model it was made for. ({BUILT_IN})")
    ] = None,
    alias: Annotated[str, typer.Option(help="What the new version is called.")] = DEFAULT_ALIAS,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter and publish it as a new version.

    Example: [bold]flora adapters push captain ./captain-adapter --alias prod[/]
    """
    from storage.adapter_directory import read_directory
    from storage.base_checkpoint import read_base_facts
    from storage.publishing import publish_adapter

    settings = storage_settings(registry, s3_endpoint)
    store = Registry(open_store(settings))
    source = base or _served_base() or BUILT_IN
    base_dir = base_directory(source, settings)
    with err.status("checking and publishing"):
        manifest = publish_adapter(
            store,
            AdapterName(tenant, name),
            read_directory(directory),
            read_base_facts(base_dir, base_name(source, base_dir)),
            alias=alias,
            max_bytes=settings.max_adapter_bytes,
        )
    if as_json:
        print_json({"name": name, "alias": alias, **_version(manifest)})
        return
    for warning in manifest.provenance.warnings:
        err.print(f"[yellow]Note:[/] {warning}")
    out.print(f"published {name}@{alias} as {manifest.version}", soft_wrap=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME@version.")],
    directory: Annotated[Path, typer.Argument(help="Where to write it; new or empty.")],
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write a version's files to a directory that PEFT can load.

    Example: [bold]flora adapters pull captain@prod ./captain[/]
    """
    from storage.adapter_directory import write_directory

    store = _open(registry, s3_endpoint)
    adapter, selector = _parsed(name, tenant)
    version = store.resolve(adapter, selector)
    files = store.manifest(adapter, version).content.files
    write_directory(directory, {path: store.read_file(entry) for path, entry in files.items()})
    if as_json:
        print_json({"name": adapter.name, "version": version, "directory": directory})
    else:
        out.print(f"{adapter.name} {short(version)} is at {directory}", soft_wrap=True)


@app.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias to move, or to make.")],
    version: Annotated[str, typer.Argument(help="A version, or an alias that means it now.")],
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean a version; moving it back is a rollback.

    Example: [bold]flora adapters alias captain prod 3f2a9c41d07b[/]
    """
    store = _open(registry, s3_endpoint)
    adapter = AdapterName(tenant, name)
    record = store.move_alias(adapter, alias, store.resolve(adapter, version))
    if as_json:
        print_json({"name": name, "alias": alias, "version": record.version})
    else:
        out.print(f"{name}@{alias} is now {record.version}", soft_wrap=True)


@app.command()
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter with all its versions and aliases.

    Example: [bold]flora adapters rm captain --yes[/]
    """
    store = _open(registry, s3_endpoint)
    adapter = AdapterName(tenant, name)
    if not yes:
        count = len(store.versions(adapter))
        typer.confirm(f"Delete {name} with {count} version(s)?", abort=True, err=True)
    store.delete(adapter)
    if as_json:
        print_json({"deleted": name})
    else:
        out.print(f"deleted {name}")


def _open(registry: str | None, s3_endpoint: str | None) -> Registry:
    return Registry(open_store(storage_settings(registry, s3_endpoint)))


def _served_base() -> str | None:
    running = find_running()
    return None if running is None else str(running.settings["engine"]["base"])


def _parsed(name: str, tenant: str) -> tuple[AdapterName, str]:
    name, _, selector = name.partition("@")
    return AdapterName(tenant, name), selector or DEFAULT_ALIAS


def _summary(
    name: AdapterName, versions: list[Manifest], aliases: Mapping[str, AliasRecord]
) -> dict[str, Any]:
    return {
        "name": name.name,
        "tenant": name.tenant,
        "aliases": {alias: record.version for alias, record in sorted(aliases.items())},
        "versions": [_version(manifest) for manifest in versions],
    }


def _version(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "family": manifest.content.family,
        "rank": manifest.content.max_rank,
        "modules": len(manifest.content.ranks),
        "num_bytes": manifest.content.num_bytes,
        "created_s": manifest.provenance.created_s,
        "source": manifest.provenance.source,
        "base": manifest.provenance.base_name,
    }


def _whole(header: str) -> Column:
    """A column that a narrow terminal may not cut: what is in it is typed into the next command."""
    return Column(header, no_wrap=True)


def _aliases(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{alias} → {short(version)}" for alias, version in aliases.items())
