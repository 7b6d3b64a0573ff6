"""Why a row misses its bar, what floor it stands on, and what is next to be tried; `benchmarks.report` prints it."""

from __future__ import annotations

from collections.abc import Mapping

_ROWS = "The base it is compared with is bound by reading weights (270 MB a step at 15 to 17 GB/s is 16 to 18 of its 31 ms)"

MISSES: Mapping[tuple[str, str], str] = {
    ("engine", "16 FLoRA r1 / our own base"): (
        f"{_ROWS}. Offset 1 at rank 1 is two rows of every product: prefill, bound by arithmetic, costs twice its "
        "products, and 64 rows instead of 32 cost a decode step 5 ms more. With nothing else that is 0.80. The rest is "
        "stacking and combining rows (4 ms a step) and calls from Python (3 ms). Next: one call for the rows of q, k, "
        "v and of gate, up."
    ),
    ("engine", "16 FLoRA r4 / our own base"): (
        "Five rows of every product where the base has one: prefill costs 3.5 times the base's, a decode step's "
        "products 1.9 times. Next: as for rank 1."
    ),
    ("engine", "16 LoRA r8 / our own base"): (
        f"{_ROWS}; 16 adapters of rank 8 are 113 MB more, at the same rate 7 ms a step, so 0.85 at best in decoding. "
        "Rows are read once for every token; next: tokens of one adapter together, in decode steps and in prompts."
    ),
}
"""(benchmark, row) → floor and reason."""
