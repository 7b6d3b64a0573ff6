"""The one form of a benchmark's result: a JSON file with the claim, how to repeat it, and rows of figures with bars."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"


class VoidRunError(Exception):
    """The two sides of a comparison were not given the same; nothing is written."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `rounds` are its single measurements, whose median is `value`; `bar` None: told, not judged."""

    name: str
    rounds: tuple[float, ...]
    bar: float | None = None
    better: Literal["higher", "lower"] = "higher"

    @property
    def value(self) -> float:
        return median(self.rounds)

    @property
    def interval_95(self) -> tuple[float, float] | None:
        """A 95 % confidence interval of the median that assumes nothing of the distribution; None below six rounds.

        Between the k-th smallest and the k-th largest round lies the median unless fewer than k rounds fall on one
        side of it, whose probability is a sum of binomial coefficients.
        """
        ordered, count = sorted(self.rounds), len(self.rounds)
        outside = 0.0
        for k in range(count // 2):
            outside += 2 * comb(count, k) / 2**count
            if outside > 0.05:
                return (ordered[k - 1], ordered[-k]) if k else None
        return None

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.better == "higher" else self.value <= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "value": self.value,
            "met": self.met,
            "interval_95": self.interval_95,
        }


@dataclass(frozen=True, slots=True)
class Side:
    """What one side of a comparison really computed with."""

    name: str
    threads: int
    cpus: tuple[int, ...]  # cores its threads may run on


@dataclass(frozen=True, slots=True)
class Lever:
    """One measure taken for speed: what it was expected to bring, before it was tried, and what it brought."""

    name: str
    predicted: float  # new speed / old speed
    measured: float | None  # None: not taken, `note` says why
    note: str = ""


def use_cores(threads: int) -> None:
    """Compute with so many threads from now on, and on no more cores than that. Call before anything is computed."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def own_side(name: str) -> Side:
    """This process, as it is set now."""
    return Side(name, torch.get_num_threads(), tuple(sorted(os.sched_getaffinity(0))))


def check_same_cores(sides: Sequence[Side]) -> None:
    """Raises VoidRunError unless all sides compute with equally many threads on the same cores."""
    if len({(side.threads, side.cpus) for side in sides}) > 1:
        told = "; ".join(
            f"{side.name} has {side.threads} threads on cores {list(side.cpus)}" for side in sides
        )
        raise VoidRunError(f"the comparison is void: {told}")


def write_result(
    name: str,
    claim: str,
    rows: Sequence[Row],
    *,
    seed: int,
    workload: Mapping[str, Any] = MappingProxyType({}),
    sides: Sequence[Side] = (),
    versions: Mapping[str, str] = MappingProxyType({}),
    levers: Sequence[Lever] = (),
    directory: Path = RESULTS,
) -> Path:
    """Write `<name>.json`; returns its path.

    Args:
        workload: of every round, by name; with the formula and the shares where requests are skewed.
        sides: of a comparison of two programs; they must have computed with the same.
        versions: of other programs than our own environment's.

    Raises:
        VoidRunError: the sides computed with different threads or cores.
    """
    check_same_cores(sides)
    content = {
        "claim": claim,
        "command": command_line(name, sys.argv[1:]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **_accelerator(),
        },
        "versions": {
            "python": platform.python_version(),
            **_versions("torch", "transformers", "ray"),
            **versions,
        },
        "seed": seed,
        "workload": dict(workload),
        "sides": [asdict(side) for side in sides],
        "rows": [row.as_dict() for row in rows],
        "levers": [asdict(lever) for lever in levers],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def command_line(name: str, arguments: Sequence[str]) -> str:
    """How to run a benchmark again; places on this machine by their last part, or from the user's home."""
    shown = []
    for argument in arguments:
        path = Path(argument)
        if path.is_relative_to(Path.home()):
            argument = f"~/{path.relative_to(Path.home())}"
        elif path.is_absolute():
            argument = f"…/{path.name}"
        shown.append(argument)
    return " ".join(["python -m", f"benchmarks.{name}", *shown])


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        interval = row.interval_95
        spread = "" if interval is None else f"   95 % {interval[0]:.3f} to {interval[1]:.3f}"
        bar = "" if row.bar is None else f"   bar {row.bar:g}: {'met' if row.met else 'missed'}"
        print(f"{row.name:<66} {row.value:9.3f}{bar}{spread}")


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: benchmarks of `workers` run where there is no Ray."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _accelerator() -> dict[str, str]:
    return {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _commit() -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor()
