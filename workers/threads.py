"""How many CPU threads an engine computes on: as many as there are cores for it, and no more; and how Python shares out
the interpreter.

Two engines that each take all cores of one machine are slower together than one after the other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SWITCH_S = 0.001


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs this process may use at once: its affinity, held to the quotas of its control groups; at least 1.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min([affine or 1, *_quotas(root)])))


def engine_threads(wanted: int) -> int:
    """The threads of an engine whose settings say `wanted`: that, or what can be used when it is 0.

    OMP_NUM_THREADS lowers the latter: Ray sets it to an actor's own CPUs.
    """
    if wanted:
        return wanted
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    usable = usable_cpus()
    return min(usable, int(named)) if named.isdecimal() and int(named) else usable


def use_threads(count: int) -> None:
    """Compute what this thread asks of torch on `count` threads; other threads keep theirs."""
    # Asked first, or this thread's first operator would ask, and take what another thread has set since.
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextmanager
def computing_on(count: int) -> Iterator[None]:
    """As `use_threads`, for a while."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def take_turns_often() -> None:
    """Have Python's threads change every millisecond, in a process whose engine steps beside other threads.

    The thread that steps asks for the interpreter after each operation, and by default waits 5 ms for a thread that
    reads an adapter: measured beside loads, steps took a tenth longer.
    """
    sys.setswitchinterval(_SWITCH_S)


def _quotas(root: Path) -> Iterator[float]:
    """CPUs by every quota above this process (cgroup v2's cpu.max, v1's cfs_quota_us)."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        parts = Path(path.lstrip("/"))
        for folder in (parts, *parts.parents):
            if hierarchy == "0":
                quota, _, period = _read(mounted / folder / "cpu.max").partition(" ")
            elif "cpu" in controllers.split(","):
                quota = _read(mounted / "cpu" / folder / "cpu.cfs_quota_us")
                period = _read(mounted / "cpu" / folder / "cpu.cfs_period_us")
            else:
                continue
            if quota.strip().isdecimal():  # "max" and -1 are no quota
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
