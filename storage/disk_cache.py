"""Adapters kept on a replica's disk: whole versions, checked on every read, within a byte budget.

Several replicas of one machine may share a directory. A version appears and disappears by a rename; what was last
used longest ago goes first. Knows nothing of tensors.

    <root>/<version>/~content.json    the version's content, whose sha256 the version is
    <root>/<version>/<file>
    <root>/~…                         being written, or being removed
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from storage.adapter_directory import write_directory
from storage.disk_index import DiskIndex
from storage.errors import AdapterCorruptError, InvalidRequestError
from storage.identity import AdapterVersion, sha256_hex
from storage.load_stages import StageClock
from storage.manifest import FileEntry, ManifestContent
from storage.records import decode, encode

_CONTENT = "~content.json"
_ABANDONED_AFTER_S = 3600.0
_SHARED_AFTER_S = 1.0
"""What others wrote counts in our budget after so long at the latest: listing the directory takes milliseconds."""
_log = logging.getLogger(__name__)


class DiskCache:
    """Safe to use from any thread. A cache may fail: a disk that is full or read-only is logged, and costs only time.

    Args:
        root: its directory, made when first needed.
        max_bytes: budget of all files. A version larger than that is not kept.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root.expanduser().absolute()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # of the index; adapters are read and written without it
        self._index = DiskIndex(self._root)
        self._remove_abandoned()
        self._index.refresh()

    def read(
        self, version: AdapterVersion, stages: StageClock | None = None
    ) -> tuple[ManifestContent, dict[str, bytes]] | None:
        """A version's content and files, and count it as used. None if it is not here, or was damaged: then it goes.

        Args:
            stages: measures the reading and the check of digests.
        """
        stages = stages or StageClock()
        folder = self._root / version
        if not folder.is_dir():
            return None
        try:
            content = _read_content(folder, stages)
            files = {
                name: _read_file(folder, name, entry, stages)
                for name, entry in content.files.items()
            }
            os.utime(folder)
        except (AdapterCorruptError, OSError) as error:
            if folder.is_dir():
                _log.warning("dropping a cached adapter: %s", error)
                self._remove(version)
            return None
        return content, files

    def write(self, content: ManifestContent, files: Mapping[str, bytes]) -> None:
        """Keep a version, at the expense of those used longest ago."""
        described = encode(content)
        num_bytes = len(described) + content.num_bytes
        if num_bytes > self._max_bytes:
            return
        version = content.version
        try:
            self._make_room(num_bytes)
            write_directory(self._root / version, {_CONTENT: described, **files})
        except (InvalidRequestError, OSError) as error:
            if (self._root / version).is_dir():
                return  # another replica wrote it
            _log.warning("the adapter cache cannot be written: %s", error)
            return
        with self._lock:
            self._index.add(version, num_bytes)

    def versions(self) -> frozenset[AdapterVersion]:
        """What is here, by name; the same object as long as nothing changes, so asking often costs little."""
        with self._lock:
            return self._index.versions()

    def check_integrity(self) -> bool:
        """The index agrees with itself, and is within the budget if nobody else writes."""
        with self._lock:
            return self._index.check_integrity() and self._index.total_bytes <= self._max_bytes

    def _make_room(self, num_bytes: int) -> None:
        while True:
            with self._lock:
                self._index.refresh(_SHARED_AFTER_S)
                is_enough = self._index.total_bytes + num_bytes <= self._max_bytes
                version = None if is_enough else self._index.longest_unused()
            if version is None:
                return
            self._remove(version)

    def _remove(self, version: AdapterVersion) -> None:
        with self._lock:
            self._index.forget(version)
        # Out of sight in one step, so that no reader meets half a version.
        removed = self._root / f"~{uuid.uuid4().hex}"
        try:
            (self._root / version).rename(removed)
            shutil.rmtree(removed)
        except FileNotFoundError:
            return  # another replica was faster
        except OSError as error:
            _log.warning("a cached adapter cannot be removed: %s", error)

    def _remove_abandoned(self) -> None:
        oldest = time.time() - _ABANDONED_AFTER_S
        if not self._root.is_dir():
            return
        for path in self._root.glob("~*"):
            with suppress(OSError):  # removed meanwhile, or the disk cannot be written
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path)


def _read_content(folder: Path, stages: StageClock) -> ManifestContent:
    with stages.stage("disk_read"):
        described = (folder / _CONTENT).read_bytes()
    with stages.stage("digest"):
        is_whole = sha256_hex(described) == folder.name
    if not is_whole:
        raise AdapterCorruptError(f"the cached content of {folder.name} is damaged")
    return decode(described, ManifestContent, f"of the cached version {folder.name}")


def _read_file(folder: Path, name: str, entry: FileEntry, stages: StageClock) -> bytes:
    with stages.stage("disk_read"):
        data = (folder / name).read_bytes()
    with stages.stage("digest"):
        is_whole = FileEntry(sha256=sha256_hex(data), num_bytes=len(data)) == entry
    if not is_whole:
        raise AdapterCorruptError(f"the cached file {name} of {folder.name} is damaged")
    return data
