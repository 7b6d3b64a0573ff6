"""The most memory a piece of work takes, as the kernel counts resident pages."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)


def peak_mib(work: Callable[[], object]) -> float | None:
    """The process's peak in MiB while it works, all that was there before included; None where no kernel tells."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before and kept is not the work's
    except AttributeError:  # another C library
        return None
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return None
    work()
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
