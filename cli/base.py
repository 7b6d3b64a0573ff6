"""`flora base`: base models on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cli.bases import BUILT_IN, list_bases, pull_base
from cli.console import AsJson, err, format_bytes, out, print_json

app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help=f"{BUILT_IN}, a hub id (owner/name), or a directory.")
    ] = BUILT_IN,
    as_json: AsJson = False,
) -> None:
    """Fetch a base model, once.

    Example: [bold]flora base pull smollm2-135m-instruct[/]
    """
    with err.status("looking for it") as progress:
        directory = pull_base(source, report=progress.update)
    if as_json:
        print_json({"name": directory.name, "directory": directory})
    else:
        out.print(f"{escape(directory.name)} is at {escape(str(directory))}", soft_wrap=True)


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the base models here.

    Example: [bold]flora base ls[/]
    """
    bases = list_bases()
    if as_json:
        print_json([asdict(base) for base in bases])
        return
    table = Table("base", "size", "directory")
    for base in bases:
        table.add_row(base.name, format_bytes(base.num_bytes), str(base.directory))
    out.print(table if bases else "no base models yet: flora base pull")
