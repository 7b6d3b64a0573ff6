"""Why a row misses its bar, what floor it stands on, and what is next to be tried; `benchmarks.report` prints it."""

from __future__ import annotations

from collections.abc import Mapping

MISSES: Mapping[tuple[str, str], str] = {
    ("memory", "bfloat16: resident memory / after warm-up"): (
        "oneDNN compiles a kernel for every number of rows it meets in bfloat16, about 0.7 MB and 1 ms of CPU each "
        "(up to 1,024 of them), so memory grows until the row counts of a load have been seen; float32 does not grow. "
        "Next: round the rows of a step up to a few sizes where they are stacked anyway; padding every product "
        "costs 10 to 50 µs of each."
    ),
}
"""(benchmark, row) → floor and reason."""
