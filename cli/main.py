"""The `flora` command."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from cli import adapters, base, chat, doctor, jobs, keys, status, train, up
from cli.console import err, print_error
from cli.demo.command import demo
from cli.errors import exit_code
from cli.interrupts import stop_on_signals
from storage.errors import FloraError


class _Commands(TyperGroup):
    """Tells our errors without a stack trace and maps them to exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FloraError as error:
            print_error(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt as error:
            err.print("stopped")
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Commands,
    name="flora",
    help="One foundation model, thousands of adapters: serve them all at once, train new ones all at once.",
    epilog="Start here:  flora demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(status.status)
app.command("demo")(demo)
app.command("chat")(chat.chat)
app.command("train")(train.train)
app.command("doctor")(doctor.doctor)
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(base.app, name="base")
app.add_typer(keys.app, name="keys")


def run() -> None:
    """The entry point: exit code 0 done, 1 it could not be done, 2 it was asked for wrongly."""
    stop_on_signals()
    app()
