"""`flora keys`: who may ask a server that needs keys. Works on the registry, which keeps them."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cli.console import AsJson, err, out, print_json
from cli.settings import RegistryOption, S3Endpoint, storage_settings
from cluster.key_store import KeyStore
from cluster.keys import ApiKey, new_key
from storage.identity import DEFAULT_TENANT
from storage.stores import open_store

app = typer.Typer(
    help="The API keys of a server that is not only for its own machine.", no_args_is_help=True
)


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose adapters it may use.")] = DEFAULT_TENANT,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also change adapters, of every tenant.")
    ] = False,
    note: Annotated[str, typer.Option(help="What it is for; shown by ls.")] = "",
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once: only a hash of it is kept.

    Example: [bold]flora keys create --tenant research --note "the notebook server"[/]
    """
    made = new_key(tenant, is_admin=admin, created_s=time.time(), note=note)
    _open(registry, s3_endpoint).add(made.key)
    if as_json:
        print_json({"key": made.token, **_shown(made.key)})
        return
    err.print(f"a key for {_rights(made.key)} of {tenant}; it will not be shown again:")
    typer.echo(made.token)


@app.command()
def ls(
    registry: RegistryOption = None, s3_endpoint: S3Endpoint = None, as_json: AsJson = False
) -> None:
    """List the keys there are, without their secrets.

    Example: [bold]flora keys ls[/]
    """
    keys = _open(registry, s3_endpoint).keys()
    if as_json:
        print_json([_shown(key) for key in keys])
        return
    table = Table("id", "tenant", "for", "made", "note")
    for key in keys:
        made = f"{datetime.fromtimestamp(key.created_s):%Y-%m-%d %H:%M}"
        table.add_row(key.key_id, key.tenant, _rights(key), made, escape(key.note))
    out.print(table if keys else "no keys yet: flora keys create --admin")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="As ls shows it.")],
    registry: RegistryOption = None,
    s3_endpoint: S3Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Let a key open nothing any more; running servers follow within seconds.

    Example: [bold]flora keys revoke 3f2a9c41d07b[/]
    """
    _open(registry, s3_endpoint).revoke(key_id)
    if as_json:
        print_json({"revoked": key_id})
    else:
        out.print(f"revoked {key_id}")


def _open(registry: str | None, s3_endpoint: str | None) -> KeyStore:
    return KeyStore(open_store(storage_settings(registry, s3_endpoint)))


def _rights(key: ApiKey) -> str:
    return "admins" if key.is_admin else "users"


def _shown(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "is_admin": key.is_admin,
        "created_s": key.created_s,
        "note": key.note,
    }
