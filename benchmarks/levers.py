"""What was done for speed on CPU, with the gain each was expected to bring and the gain it brought.

A gain is new speed over old speed of the engine decoding 32 base requests, or of what `note` names, in one run on one
machine. `benchmarks.engine` writes this list into its result.
"""

from __future__ import annotations

from benchmarks.results_file import Lever

CPU_LEVERS: tuple[Lever, ...] = ()
