"""The compiled loops, for tests of them: an extra, so a machine without a compiler has nothing to test."""

from __future__ import annotations

import pytest

from workers.compiled.library import CompiledLoops, compiled_loops


def library() -> CompiledLoops:
    loops = compiled_loops()
    if loops is None:
        pytest.skip("this machine has no C++ compiler")
    return loops
