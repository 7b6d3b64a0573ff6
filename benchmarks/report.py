"""`python -m benchmarks.report`: one table of all results, and the rows that miss their bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.misses import MISSES
from benchmarks.results_file import RESULTS


def report(directory: Path = RESULTS, misses: Mapping[tuple[str, str], str] = MISSES) -> list[str]:
    """The lines to print: the table, the levers of speed, then every row that misses its bar, with the reason."""
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(directory.glob("*.json"))
    }
    lines = [f"{'benchmark':<15} {'row':<66} {'value':>9} {'bar':>7}  met  95 % interval"]
    missed: list[str] = []
    levers: list[str] = []
    for name, result in results.items():
        for row in result["rows"]:
            lines.append(
                f"{name:<15} {row['name']:<66} {row['value']:>9.3g} {_bar(row):>7}  {_met(row):<3}  {_interval(row)}"
            )
            if row["met"] is False:
                reason = misses.get((name, row["name"]), "no reason is known yet")
                missed.append(
                    f"missed  {name}: {row['name']} is {row['value']:.3g}, bar {_bar(row)}: {reason}"
                )
        levers += [_lever(name, lever) for lever in result.get("levers", ())]
    return [*lines, *levers, *missed]


def main() -> None:
    print("\n".join(report()))


def _bar(row: dict[str, Any]) -> str:
    if row["bar"] is None:
        return "—"
    return f"{'≥' if row['better'] == 'higher' else '≤'} {row['bar']:g}"


def _met(row: dict[str, Any]) -> str:
    return {None: "—", True: "yes", False: "no"}[row["met"]]


def _interval(row: dict[str, Any]) -> str:
    interval = row.get("interval_95")
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _lever(name: str, lever: dict[str, Any]) -> str:
    brought = "not taken" if lever["measured"] is None else f"{lever['measured']:.2f} ×"
    note = f" ({lever['note']})" if lever["note"] else ""
    return f"lever   {name}: {lever['name']}: {lever['predicted']:.2f} × predicted, {brought}{note}"


if __name__ == "__main__":
    main()
