"""`flora adapters`: the registry, by hand. Works with or without a running cluster; a running one follows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cli.adapter_tables import described, ls, show
from cli.bases import BUILT_IN
from cli.console import AsJson, err, out, print_json, short
from cli.settings import (
    Name,
    RegistryOption,
    S3Endpoint,
    Tenant,
    base_facts,
    storage_settings,
)
from cli.upkeep import gc, import_, verify
from storage.errors import InvalidRequestError
from storage.identity import DEFAULT_ALIAS, DEFAULT_TENANT, AdapterName
from storage.registry import Registry
from storage.stores import open_store

app = typer.Typer(help="The adapters of the registry.", no_args_is_help=True)

app.command()(ls)
app.command()(show)


@app.command()
def push(
    name: Name,
    source: Annotated[
        str, typer.Argument(help="An adapter as PEFT saves it: a directory or s3://bucket/prefix.")
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
    from storage.adapter_source import open_source
    from storage.publishing import publish_adapter

    settings = storage_settings(registry, s3_endpoint)
    files = open_source(source, settings).read("")
    store = Registry(open_store(settings))
    facts = base_facts(base, settings)
    with err.status("checking and publishing"):
        manifest = publish_adapter(
            store,
            AdapterName(tenant, name),
            files,
            facts,
            alias=alias,
            max_bytes=settings.max_adapter_bytes,
        )
    if as_json:
        print_json({"name": name, "alias": alias, **described(manifest, {})})
        return
    for warning in manifest.provenance.warnings:
        err.print(f"[yellow]Note:[/] {escape(warning)}")
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
        out.print(f"{adapter.name} {short(version)} is at {escape(str(directory))}", soft_wrap=True)


@app.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias to move, or to make.")],
    version: Annotated[
        str | None, typer.Argument(help="A version, or an alias that means it now.")
    ] = None,
    back: Annotated[
        bool, typer.Option("--back", help="To what it meant before; twice undoes it.")
    ] = False,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Let an alias mean a version, or roll it back.

    Example: [bold]flora adapters alias captain prod 3f2a9c41d07b[/]
    Example: [bold]flora adapters alias captain prod --back[/]
    """
    if back == (version is not None):
        raise InvalidRequestError("give either a version or --back", param="version")
    store = _open(registry, s3_endpoint)
    adapter = AdapterName(tenant, name)
    if version is None:
        record = store.roll_back(adapter, alias)
    else:
        record = store.move_alias(adapter, alias, store.resolve(adapter, version))
    if as_json:
        print_json(
            {
                "name": name,
                "alias": alias,
                "version": record.version,
                "generation": record.generation,
            }
        )
    else:
        out.print(f"{name}@{alias} is now {record.version}", soft_wrap=True)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="NAME, or NAME@version for one version of it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter with all its versions and aliases, or one version that no alias means.

    The files go with the next [bold]flora adapters gc[/] after the grace period.

    Example: [bold]flora adapters rm captain --yes[/]
    """
    store = _open(registry, s3_endpoint)
    name, at, selector = name.partition("@")
    adapter = AdapterName(tenant, name)
    version = store.find_version(adapter, selector) if at else None
    if not yes:
        count = len(store.versions(adapter))
        what = f"{name} with {count} version(s)" if version is None else f"{name}@{short(version)}"
        typer.confirm(f"Delete {what}?", abort=True, err=True)
    if version is None:
        store.delete(adapter)
    else:
        store.delete_version(adapter, version)
    if as_json:
        print_json({"deleted": name, "version": version})
    else:
        out.print(f"deleted {name}" if version is None else f"deleted {name}@{short(version)}")


@app.command()
def pin(
    name: Name,
    copies: Annotated[int, typer.Option(min=1, help="On how many replicas at least.")] = 1,
    off: Annotated[bool, typer.Option("--off", help="Take the pin away.")] = False,
    tenant: Tenant = DEFAULT_TENANT,
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter on replicas whether or not anybody asks for it.

    Example: [bold]flora adapters pin captain --copies 2[/]
    """
    store = _open(registry, s3_endpoint)
    adapter = AdapterName(tenant, name)
    if off:
        store.unpin(adapter)
    else:
        store.pin(adapter, copies)
    pinned = 0 if off else copies
    if as_json:
        print_json({"name": name, "pinned_copies": pinned})
    else:
        out.print(f"{name} is pinned to {pinned} replica(s)" if pinned else f"{name} is not pinned")


app.command("import")(import_)
app.command("gc")(gc)
app.command("verify")(verify)


def _open(registry: str | None, s3_endpoint: str | None) -> Registry:
    return Registry(open_store(storage_settings(registry, s3_endpoint)))


def _parsed(name: str, tenant: str) -> tuple[AdapterName, str]:
    name, _, selector = name.partition("@")
    return AdapterName(tenant, name), selector or DEFAULT_ALIAS
