"""`python -m benchmarks.report`: one table of all results, and the rows that miss their bar."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results_file import RESULTS


def main() -> None:
    console = Console()
    table = Table("benchmark", "row", "value", "bar", "met")
    missed: list[str] = []
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            table.add_row(path.stem, row["name"], f"{row['value']:.3g}", _bar(row), _met(row))
            if row["met"] is False:
                missed.append(f"{path.stem}: {row['name']} is {row['value']:.3g}, bar {_bar(row)}")
    console.print(table)
    for line in missed:
        console.print(f"missed  {line}", soft_wrap=True)


def _bar(row: dict[str, Any]) -> str:
    if row["bar"] is None:
        return "—"
    return f"{'≥' if row['better'] == 'higher' else '≤'} {row['bar']:g}"


def _met(row: dict[str, Any]) -> str:
    return {None: "—", True: "yes", False: "no"}[row["met"]]


if __name__ == "__main__":
    main()
