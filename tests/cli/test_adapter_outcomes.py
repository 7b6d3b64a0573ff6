"""The table a job ends with: every adapter, its losses, and what it came to."""

from __future__ import annotations

import io

from rich.console import Console

from cli.adapter_outcomes import outcome_table
from training.learning_curve import Curve

VERSION = "0123456789ab" * 5 + "cdef"
RED = Curve("red", tuple((n, 9.0 - n) for n in range(1, 9)), ((4, 5.25), (8, 1.5)))


def lines_of(*curves: Curve, failed: dict[str, str] | None = None) -> list[str]:
    file = io.StringIO()
    table = outcome_table(curves, {"red": VERSION}, failed or {})
    Console(file=file, width=80).print(table)
    return file.getvalue().splitlines()


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_a_published_adapter_has_its_losses_their_course_and_a_version_that_can_be_copied() -> None:
    [row] = [line for line in lines_of(RED) if "red" in line]
    assert cells_of(row) == ["red", "8", "8.000", "1.000", "1.500", "█▇▆▅▄▃▂▁", VERSION[:12]]


def test_adapters_stay_in_the_order_given_and_those_without_steps_are_rows_too() -> None:
    rows = [cells_of(line) for line in lines_of(RED, Curve("blue")) if "│" in line]
    assert [row[0] for row in rows] == ["red", "blue"]
    assert rows[1] == ["blue", "0", "", "", "", "", "not finished"]


def test_long_names_and_reasons_are_folded_not_cut_in_a_narrow_terminal() -> None:
    name, reason = "customer-support-answers-r16-lr0.008", "the loss of step 12 is not finite [1]"
    curve = Curve(name, ((1, 12.345),), is_failed=True)
    lines = lines_of(RED, curve, failed={name: reason})
    assert max(map(len, lines)) <= 80
    body = [cells_of(line) for line in lines if "│" in line][1:]
    assert "".join(row[0] for row in body) == name
    assert body[0][2] == "12.345"
    assert "".join("".join(row[-1] for row in body).split()) == "".join(reason.split())
