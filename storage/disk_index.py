"""Which versions a cache directory holds, their sizes and when they were used: in memory, and right though others
write there too.

The directory is listed again only when its own time changed, and a version is measured once. Knows nothing of files
inside a version.
"""

from __future__ import annotations

import heapq
import os
import time
from pathlib import Path

from storage.identity import AdapterVersion, is_version

_TICK_NS = 50_000_000
"""Two changes of a directory may bear the same time if they are no further apart: the file system's clock is coarse."""

_SPARE = 64


class DiskIndex:
    """Not thread-safe. A directory that cannot be read counts as empty.

    Times of use are the folders' own, which every process can see and which only grow.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._changed_ns = 0  # the directory's time when it was listed; 0: list it again
        self._refreshed_s = float("-inf")
        self._num_bytes: dict[AdapterVersion, int] = {}
        self._by_use: list[tuple[int, AdapterVersion]] = []  # a heap; times may be out of date
        self._versions: frozenset[AdapterVersion] | None = None
        self.total_bytes = 0

    def versions(self) -> frozenset[AdapterVersion]:
        """The same object as long as nothing changes."""
        self.refresh()
        if self._versions is None:
            self._versions = frozenset(self._num_bytes)
        return self._versions

    def refresh(self, max_age_s: float = 0.0) -> None:
        """Learn of what others wrote or removed, unless that was done less than `max_age_s` ago."""
        now_s = time.monotonic()
        if now_s - self._refreshed_s < max_age_s:
            return
        self._refreshed_s = now_s
        try:
            changed_ns = self._root.stat().st_mtime_ns
            if changed_ns == self._changed_ns:
                return
            now_ns = time.time_ns()
            with os.scandir(self._root) as entries:
                names = {entry.name for entry in entries}
        except OSError:
            changed_ns, now_ns, names = 0, 0, set()
        for version in self._num_bytes.keys() - names:
            self.forget(version)
        for name in names - self._num_bytes.keys():
            if is_version(name):
                self._measure(AdapterVersion(name))
        self._changed_ns = changed_ns if now_ns - changed_ns > _TICK_NS else 0

    def add(self, version: AdapterVersion, num_bytes: int) -> None:
        """It was just written."""
        self.forget(version)
        self._num_bytes[version] = num_bytes
        self.total_bytes += num_bytes
        self._push(version, time.time_ns())

    def forget(self, version: AdapterVersion) -> None:
        """It is gone; no error when it was not here."""
        num_bytes = self._num_bytes.pop(version, None)
        if num_bytes is not None:
            self.total_bytes -= num_bytes
            self._versions = None

    def longest_unused(self) -> AdapterVersion | None:
        """The version that nobody, in any process, used for the longest time; None when there is none."""
        while self._by_use:
            used_ns, version = self._by_use[0]
            if version not in self._num_bytes:
                heapq.heappop(self._by_use)
                continue
            now_used_ns = self._used_ns(version)
            if now_used_ns is None:
                self.forget(version)
            elif now_used_ns > used_ns:
                heapq.heapreplace(self._by_use, (now_used_ns, version))
            else:
                return version
        return None

    def check_integrity(self) -> bool:
        """The sizes add up, and every version has its place in the order of use."""
        return self.total_bytes == sum(self._num_bytes.values()) and self._num_bytes.keys() <= {
            version for _, version in self._by_use
        }

    def _measure(self, version: AdapterVersion) -> None:
        folder = self._root / version
        try:
            with os.scandir(folder) as files:
                num_bytes = sum(file.stat().st_size for file in files)
            used_ns = folder.stat().st_mtime_ns
        except OSError:
            return  # removed meanwhile
        self._num_bytes[version] = num_bytes
        self.total_bytes += num_bytes
        self._push(version, used_ns)

    def _push(self, version: AdapterVersion, used_ns: int) -> None:
        if len(self._by_use) > 2 * len(self._num_bytes) + _SPARE:  # most are of versions long gone
            latest = {one: one_ns for one_ns, one in sorted(self._by_use)}
            self._by_use = [(ns, one) for one, ns in latest.items() if one in self._num_bytes]
            heapq.heapify(self._by_use)
        heapq.heappush(self._by_use, (used_ns, version))
        self._versions = None

    def _used_ns(self, version: AdapterVersion) -> int | None:
        try:
            return (self._root / version).stat().st_mtime_ns
        except OSError:
            return None
