"""How many replicas: `--replicas 2`, or `--replicas 1..4` for a number that follows the load."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import typer

_SHAPE = re.compile(r"([0-9]+)(?:\.\.([0-9]+))?")


class ReplicaRange(NamedTuple):
    least: int
    most: int

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most

    def __str__(self) -> str:
        return str(self.least) if self.is_fixed else f"{self.least}..{self.most}"


def parse_replicas(text: str) -> ReplicaRange:
    """`N` or `A..B`. Raises typer.BadParameter, which is exit code 2, for anything else."""
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is neither a number such as 2 nor a range such as 1..4")
    least = int(found[1])
    most = int(found[2] or least)
    if least < 1:
        raise typer.BadParameter(f"{text!r}: at least one replica must answer")
    if most < least:
        raise typer.BadParameter(f"{text!r} ends before it begins; write the smaller number first")
    return ReplicaRange(least, most)


ReplicasOption = Annotated[
    ReplicaRange | None,
    typer.Option(
        "--replicas",
        parser=parse_replicas,
        metavar="N or A..B",
        help="Engines that answer; a range follows the load. (1)",
    ),
]
