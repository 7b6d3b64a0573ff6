"""The one form of a benchmark's result: a JSON file with the claim, how to repeat it, and rows of figures with bars."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

RESULTS = Path(__file__).parent / "results"


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
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.better == "higher" else self.value <= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "value": self.value, "met": self.met}


def write_result(name: str, claim: str, rows: Sequence[Row], *, seed: int) -> Path:
    """Write `results/<name>.json`; returns its path."""
    content = {
        "claim": claim,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{one: version(one) for one in ("torch", "transformers")},
        },
        "seed": seed,
        "rows": [row.as_dict() for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


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
