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
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.adapter_directory import write_directory
from storage.errors import AdapterCorruptError, InvalidRequestError
from storage.identity import AdapterVersion, is_version, sha256_hex
from storage.manifest import FileEntry, ManifestContent
from storage.records import decode, encode

_CONTENT = "~content.json"
_ABANDONED_AFTER_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    path: Path
    num_bytes: int
    used_ns: int


class DiskCache:
    """A cache may fail: a disk that is full or read-only is logged, and costs only time.

    Args:
        root: its directory, made when first needed.
        max_bytes: budget of all files. A version larger than that is not kept.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root.expanduser().absolute()
        self._max_bytes = max_bytes
        self._remove_abandoned()

    def read(self, version: AdapterVersion) -> tuple[ManifestContent, dict[str, bytes]] | None:
        """A version's content and files, and count it as used. None if it is not here, or was damaged: then it goes."""
        folder = self._root / version
        try:
            described = (folder / _CONTENT).read_bytes()
            if sha256_hex(described) != version:
                raise AdapterCorruptError(f"the cached content of {version} is damaged")
            content = decode(described, ManifestContent, f"of the cached version {version}")
            files = {name: _checked(folder, name, entry) for name, entry in content.files.items()}
            os.utime(folder)
        except (AdapterCorruptError, OSError) as error:
            if folder.is_dir():
                _log.warning("dropping a cached adapter: %s", error)
                self._remove(folder)
            return None
        return content, files

    def write(self, content: ManifestContent, files: Mapping[str, bytes]) -> None:
        """Keep a version, at the expense of those used longest ago."""
        described = encode(content)
        num_bytes = len(described) + content.num_bytes
        if num_bytes > self._max_bytes:
            return
        try:
            self._make_room(num_bytes)
            write_directory(self._root / content.version, {_CONTENT: described, **files})
        except (InvalidRequestError, OSError) as error:
            if (self._root / content.version).is_dir():
                return  # another replica wrote it
            _log.warning("the adapter cache cannot be written: %s", error)

    def versions(self) -> frozenset[AdapterVersion]:
        try:
            return frozenset(
                AdapterVersion(path.name) for path in self._root.iterdir() if is_version(path.name)
            )
        except OSError:
            return frozenset()

    def _make_room(self, num_bytes: int) -> None:
        kept = sorted(self._kept(), key=lambda one: one.used_ns)
        used = sum(one.num_bytes for one in kept)
        for one in kept:
            if used + num_bytes <= self._max_bytes:
                return
            self._remove(one.path)
            used -= one.num_bytes

    def _kept(self) -> list[_Kept]:
        kept = []
        for version in self.versions():
            path = self._root / version
            with suppress(FileNotFoundError):  # removed meanwhile
                num_bytes = sum(file.stat().st_size for file in path.iterdir())
                kept.append(_Kept(path, num_bytes, path.stat().st_mtime_ns))
        return kept

    def _remove(self, folder: Path) -> None:
        # Out of sight in one step, so that no reader meets half a version.
        removed = self._root / f"~{uuid.uuid4().hex}"
        try:
            folder.rename(removed)
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
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path)


def _checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    data = (folder / name).read_bytes()
    if FileEntry(sha256=sha256_hex(data), num_bytes=len(data)) != entry:
        raise AdapterCorruptError(f"the cached file {name} of {folder.name} is damaged")
    return data
