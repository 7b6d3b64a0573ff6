"""Why a row misses its bar, what floor it stands on, and what is next to be tried; `benchmarks.report` prints it."""

from __future__ import annotations

from collections.abc import Mapping

_ROWS = "The base beside it is bound by reading weights: 270 MB a step at 15 to 17 GB/s are 16 to 18 of its 31 ms"

_FLOAT32 = (
    "Two runs before, of the same code at this size, were at 2.01 and 2.02. Eight adapters make 222 tokens a second at "
    "32 tokens each, and 242 at any more: that is this CPU's float32 arithmetic. In bfloat16, in which jobs train "
    "unless told otherwise, the row is at 2.86. Next: attention over all adapters' tokens at once."
)

_STREAMED = (
    "Ingress, router, replica and client share the two cores that compute, and every token is an event of its own. One "
    "stream for each ingress and replica instead of one for each request took it from 0.591 here, and whole responses "
    "from 0.72. Next: encoding a step's events once for all requests of a connection."
)

MISSES: Mapping[tuple[str, str], str] = {
    ("quality_languages", "FLoRA r1's gain over the base / LoRA r4's"): (
        "A quarter of LoRA r4's parameters, in 100 steps; FLoRA r4, with as many, gains 1.05 times what it gains. "
        "Rates three times as high and as low were worse for both. Next: more steps and more seeds."
    ),
    ("engine", "our engine, no adapters / vLLM, no adapters"): (
        "Equal within what runs differ by: 1.006 in the run before. Both read all weights once a step. Of our 31 ms, "
        "18 are products, 5 compiled loops, 6 calls from Python. Next: fewer calls; no widening of logits for greedy "
        "rows."
    ),
    ("engine", "16 FLoRA r1 / our own base"): (
        f"{_ROWS}. Offset 1 at rank 1 is two rows of every product: prefill, bound by arithmetic, costs twice its "
        "products, and 64 rows instead of 32 cost a decode step 5 ms more. With nothing else that is 0.80. The rest is "
        "stacking and combining rows (4 ms a step) and calls from Python (3 ms). Next: one call for the rows of q, k, "
        "v and of gate, up."
    ),
    ("engine", "16 LoRA r8 / our own base"): (
        f"{_ROWS}; 16 adapters of rank 8 are 113 MB more, at the same rate 7 ms a step, so 0.85 at best in decoding. "
        "Rows are read once for every token; next: tokens of one adapter together, in decode steps and in prompts."
    ),
    ("training", "float32, 8 FLoRA r1, 32 tokens each: together / one after another"): _FLOAT32,
    ("placement", "ours, mmpp-adapter, rank 1, 0.55, held-out seed: worst imbalance"): (
        "1.134, bar 1.12, in one window of 30 s; the others of the run are at 1.02 to 1.07, and less than .02 is "
        "noise. In it the most popular adapter falls from 27 % of the traffic to 14 %, which evened out the rest, and "
        "another's burst brings it to .92 of a replica's work, of which one replica has .37 until copies come. Next: a "
        "second copy in the tick in which a burst shows."
    ),
    ("memory", "bfloat16: resident memory / after warm-up"): (
        "oneDNN keeps a kernel for every number of rows it meets in bfloat16, about 0.7 MB each. Row counts are now "
        "rounded up to 48 sizes up to 2,048 rows, so the growth ends; this load meets its last sizes late."
    ),
    ("serving", "over HTTP, streamed / the same engine in process"): _STREAMED,
}
"""(benchmark, row) → floor and reason."""
