"""What a person sees: results on stdout, progress and errors on stderr; with `--json`, stdout holds one JSON value."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from storage.errors import FloraError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]


def print_json(value: Any) -> None:
    """One JSON value on stdout, readable and parseable; paths and the like as text."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_error(error: FloraError) -> None:
    err.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)


def format_bytes(num_bytes: float) -> str:
    """1,234,567 → `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def short(version: str) -> str:
    """The start of a version that people read, and that `NAME@…` accepts."""
    return version[:12]
