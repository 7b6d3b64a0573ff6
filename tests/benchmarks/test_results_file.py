"""A result says all a reader needs to judge it, and a comparison of unequal sides is not written at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.misses import MISSES
from benchmarks.report import report
from benchmarks.results_file import (
    RESULTS,
    Lever,
    Row,
    Side,
    VoidRunError,
    check_same_cores,
    command_line,
    own_side,
    write_result,
)

HEAD = {"claim", "command", "commit", "date", "machine", "versions", "seed", "rows"}


def test_a_result_has_the_head_that_all_results_share(tmp_path: Path) -> None:
    path = write_result(
        "some", "It is fast.", [Row("speed", (1.0, 3.0, 2.0), 1.5)], seed=4, directory=tmp_path
    )
    result = json.loads(path.read_text())
    assert result.keys() >= HEAD
    assert result["seed"] == 4
    assert result["machine"]["threads"] >= 1
    assert {"torch", "python"} <= result["versions"].keys()
    [row] = result["rows"]
    assert row["rounds"] == [1.0, 3.0, 2.0]
    assert (row["value"], row["bar"], row["better"], row["met"]) == (2.0, 1.5, "higher", True)


def test_a_result_names_what_each_side_computed_with(tmp_path: Path) -> None:
    sides = [Side("ours", 2, (0, 1)), Side("theirs", 2, (0, 1))]
    path = write_result("some", "", [], seed=0, sides=sides, directory=tmp_path)
    assert [(side["name"], side["threads"]) for side in json.loads(path.read_text())["sides"]] == [
        ("ours", 2),
        ("theirs", 2),
    ]


@pytest.mark.parametrize(
    "theirs", [Side("theirs", 1, (0, 1)), Side("theirs", 2, (0,)), Side("theirs", 2, (0, 2))]
)
def test_a_run_whose_sides_had_other_threads_or_cores_is_void(tmp_path: Path, theirs: Side) -> None:
    sides = [Side("ours", 2, (0, 1)), theirs]
    with pytest.raises(VoidRunError, match="theirs has"):
        check_same_cores(sides)
    with pytest.raises(VoidRunError):
        write_result(
            "some", "", [Row("speed", (9.0,), 1.0)], seed=0, sides=sides, directory=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_this_process_agrees_with_itself() -> None:
    check_same_cores([own_side("one"), own_side("other")])


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", (1.0,)), None),
        (Row("a", (1.0,), 1.0), True),
        (Row("a", (0.9,), 1.0), False),
        (Row("a", (0.9,), 1.0, "lower"), True),
        (Row("a", (1.1,), 1.0, "lower"), False),
    ],
)
def test_a_bar_is_met_on_its_own_side(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_a_result_names_no_place_of_this_machine() -> None:
    home = str(Path.home() / "models" / "small")
    assert command_line(
        "some", ["--base", home, "--python", "/opt/some/bin/python", "--rounds", "3"]
    ) == ("python -m benchmarks.some --base ~/models/small --python …/python --rounds 3")


def test_an_interval_of_few_rounds_is_not_claimed() -> None:
    assert Row("a", (1.0, 2.0, 3.0, 4.0, 5.0)).interval_95 is None
    assert Row("a", (4.0, 2.0, 3.0, 1.0, 6.0, 5.0)).interval_95 == (1.0, 6.0)


def test_the_interval_of_twenty_rounds_is_the_one_in_tables_of_the_sign_test() -> None:
    assert Row("a", tuple(map(float, range(1, 21)))).interval_95 == (6.0, 15.0)


def test_the_report_names_every_miss_with_its_reason_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        Row("quick enough", (2.0,), 1.0),
        Row("too slow", (0.5,), 1.0),
        Row("too big", (3.0,), 2.0, "lower"),
        Row("only told", (7.0,)),
    ]
    write_result("one", "", rows, seed=0, directory=tmp_path)
    reasons = {("one", "too slow"): "the floor is 0.6", ("one", "quick enough"): "never printed"}
    assert [line for line in report(tmp_path, reasons) if line.startswith("missed")] == [
        "missed  one: too slow is 0.5, bar ≥ 1: the floor is 0.6",
        "missed  one: too big is 3, bar ≤ 2: no reason is known yet",
    ]


def test_the_report_has_every_row_of_every_result(tmp_path: Path) -> None:
    write_result("one", "", [Row("first", (1.0,))], seed=0, directory=tmp_path)
    write_result("two", "", [Row("second", (1.0,))], seed=0, directory=tmp_path)
    table = "\n".join(report(tmp_path))
    assert "first" in table
    assert "second" in table


def test_a_lever_is_reported_with_what_was_predicted_and_what_it_brought(tmp_path: Path) -> None:
    levers = [Lever("packed weights", 1.3, 1.1), Lever("threads", 1.2, None, "not on this machine")]
    write_result("one", "", [], seed=0, levers=levers, directory=tmp_path)
    assert [line for line in report(tmp_path) if line.startswith("lever")] == [
        "lever   one: packed weights: 1.30 × predicted, 1.10 ×",
        "lever   one: threads: 1.20 × predicted, not taken (not on this machine)",
    ]


def test_every_committed_row_that_misses_its_bar_says_why_and_no_other_row_does() -> None:
    missed = {
        (path.stem, row["name"])
        for path in RESULTS.glob("*.json")
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if row["met"] is False
    }
    assert missed == set(MISSES)
