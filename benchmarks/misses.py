"""Why a row misses its bar, what floor it stands on, and what is next to be tried; `benchmarks.report` prints it."""

from __future__ import annotations

from collections.abc import Mapping

MISSES: Mapping[tuple[str, str], str] = {}
"""(benchmark, row) → floor and reason."""
