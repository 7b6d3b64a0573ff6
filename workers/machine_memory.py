"""How much memory this process may take at most: the machine's, or less where a control group says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes, whoever else uses some of them now.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    return min([psutil.virtual_memory().total, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Bytes by every limit above this process (cgroup v2's memory.max, v1's memory.limit_in_bytes)."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        parts = Path(path.lstrip("/"))
        for folder in (parts, *parts.parents):
            if hierarchy == "0":
                limit = _read(mounted / folder / "memory.max")
            elif "memory" in controllers.split(","):
                limit = _read(mounted / "memory" / folder / "memory.limit_in_bytes")
            else:
                continue
            if limit.strip().isdecimal():  # "max" is no limit
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
