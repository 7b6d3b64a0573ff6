"""What became of a job's adapters, as the table that `flora train` ends with and `flora jobs show` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Column, Table

from cli.console import short
from training.learning_curve import Curve, sparkline

_COURSE_WIDTH = 12


def outcome_table(
    curves: Sequence[Curve], published: Mapping[str, str], failed: Mapping[str, str]
) -> Table:
    """A row for each adapter: its losses, and its version or why it failed.

    Fits into 80 columns; what is too long is folded, never cut.

    Args:
        published: adapter → version.
        failed: adapter → reason.
    """
    table = Table(
        Column("adapter", overflow="fold"),
        Column("steps", justify="right", no_wrap=True),
        Column("first\nloss", justify="right", no_wrap=True),
        Column("last\nloss", justify="right", no_wrap=True),
        Column("held\nout", justify="right", no_wrap=True),
        Column("course", min_width=_COURSE_WIDTH, no_wrap=True),
        Column("version", min_width=len(short("0" * 64)), overflow="fold"),
    )
    for curve in curves:
        name, losses = curve.adapter, curve.losses
        table.add_row(
            name,
            str(curve.training[-1][0] if curve.training else 0),
            _loss(losses[:1]),
            _loss(losses[-1:]),
            _loss([loss for _, loss in curve.held_out[-1:]]),
            sparkline(curve, _COURSE_WIDTH),
            f"[red]{escape(failed[name])}[/]"
            if name in failed
            else short(published.get(name, "")) or "not finished",
        )
    return table


def _loss(losses: Sequence[float]) -> str:
    return f"{losses[0]:.3f}" if losses else ""
