"""`python -m benchmarks.report`: one table of all results, and the rows that miss their bar."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.results_file import RESULTS


def main() -> None:
    missed: list[str] = []
    print(f"{'benchmark':<12} {'row':<36} {'value':>9} {'bar':>8}  met")
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            figures = f"{row['value']:>9.3g} {_bar(row):>8}  {_met(row)}"
            print(f"{path.stem:<12} {row['name']:<36} {figures}")
            if row["met"] is False:
                missed.append(f"{path.stem}: {row['name']} is {row['value']:.3g}, bar {_bar(row)}")
    for line in missed:
        print(f"missed  {line}")


def _bar(row: dict[str, Any]) -> str:
    if row["bar"] is None:
        return "—"
    return f"{'≥' if row['better'] == 'higher' else '≤'} {row['bar']:g}"


def _met(row: dict[str, Any]) -> str:
    return {None: "—", True: "yes", False: "no"}[row["met"]]


if __name__ == "__main__":
    main()
