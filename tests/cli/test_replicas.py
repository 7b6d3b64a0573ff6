"""`--replicas`: a number, or a range that follows the load."""

from __future__ import annotations

import pytest
import typer

from cli.replicas import ReplicaRange, parse_replicas


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", (1, 1)), ("3", (3, 3)), ("1..4", (1, 4)), (" 2..2 ", (2, 2)), ("08..10", (8, 10))],
)
def test_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_replicas(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither a number"),
        ("many", "neither a number"),
        ("1-4", "neither a number"),
        ("1..", "neither a number"),
        ("1...4", "neither a number"),
        ("-1", "neither a number"),
        ("0", "at least one"),
        ("0..3", "at least one"),
        ("4..1", "smaller number first"),
    ],
)
def test_anything_else_is_refused_and_why(text: str, why: str) -> None:
    with pytest.raises(typer.BadParameter, match=why):
        parse_replicas(text)


def test_it_reads_as_it_was_written() -> None:
    assert [str(ReplicaRange(1, 4)), str(ReplicaRange(2, 2))] == ["1..4", "2"]
