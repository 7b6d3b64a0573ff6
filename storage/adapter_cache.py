"""How a replica comes by an adapter's rows: from memory, else from disk, else from the registry.

Everything is keyed by version, so an entry can be old but never wrong; what is on disk or in the registry is checked
against its digest on every read. When the registry is away, what is near keeps being served.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from storage.adapter_rows import AdapterRows
from storage.config import StorageSettings
from storage.disk_cache import DiskCache
from storage.errors import AdapterCorruptError, AdapterRefusedError, FloraError
from storage.formats.peft import read_peft
from storage.identity import AdapterVersion
from storage.load_stages import Stage, StageClock
from storage.manifest import ManifestContent
from storage.registry import Registry
from storage.registry_reader import RegistryReader
from storage.stores import open_store_to_read

FAILURE_KEPT_S = 5.0
"""How long a version that exists but cannot be served is refused without looking again."""


@dataclass(frozen=True, slots=True)
class CachedAdapter:
    """Rows, read-only and shared with other callers, the nearest place they were found in, and how long that took."""

    rows: AdapterRows
    tier: Literal["host", "disk", "registry"]
    stage_s: Mapping[Stage, float] = field(default_factory=dict)


class AdapterCache:
    """Safe to use from any thread. One load per version at a time: others that ask meanwhile wait for it.

    Args:
        registry: where versions come from; asked for what is on neither tier.
        settings: directories and budgets.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        registry: Registry,
        settings: StorageSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = RegistryReader(registry, clock)
        self._clock = clock
        self._max_adapter_bytes = settings.max_adapter_bytes
        self._max_host_bytes = settings.host_bytes
        self._disk = DiskCache(settings.cache_dir / "adapters", settings.cache_bytes)
        self._lock = threading.Lock()
        self._host: OrderedDict[AdapterVersion, AdapterRows] = OrderedDict()  # last used last
        self._host_bytes = 0
        self._loads: dict[AdapterVersion, Future[CachedAdapter]] = {}
        self._failures: dict[AdapterVersion, tuple[float, FloraError]] = {}

    @classmethod
    def open(cls, settings: StorageSettings) -> Self:
        """Before the registry that the settings name, which may be away. Raises InvalidRequestError."""
        return cls(Registry(open_store_to_read(settings)), settings)

    def find_near(self, version: AdapterVersion) -> CachedAdapter | None:
        """An adapter's rows from memory or disk, None if they are on neither: never waits for the registry, nor for
        whoever does.

        Raises:
            AdapterRefusedError: its files are whole and break a rule.
            StoreUnavailableError: they are on neither, and it is known that they could not be fetched now.
        """
        with self._lock:
            near = self._on_host(version)
        if near is not None:
            return near
        near = self._on_disk(version, StageClock())
        if near is None:
            self._registry.check_up()
            return None
        with self._lock:
            self._keep(version, near.rows)
        return near

    def get(self, version: AdapterVersion) -> CachedAdapter:
        """An adapter's rows, bound to the base its manifest names. Blocks while it is read: not for a step thread.

        Raises:
            UnknownModelError: the registry has no such version. Not remembered: it may be published any moment.
            AdapterCorruptError, AdapterRefusedError: it exists and cannot be served. Remembered `FAILURE_KEPT_S`.
            StoreUnavailableError: it is on no tier here and the registry cannot be reached; told at once while that
                is known.
        """
        with self._lock:
            near = self._on_host(version)
            if near is not None:
                return near
            self._raise_failure(version)
            load = self._loads.get(version)
            is_ours = load is None
            if load is None:
                load = self._loads[version] = Future()
        if is_ours:
            self._run(version, load)
        return load.result()

    def is_registry_up(self) -> bool:
        """Whether the registry answered lately. Returns at once; to be asked now and then, as it probes when asked."""
        return self._registry.is_up()

    def host_versions(self) -> frozenset[AdapterVersion]:
        with self._lock:
            return frozenset(self._host)

    def disk_versions(self) -> frozenset[AdapterVersion]:
        """Versions on disk, known by name. The same object as long as nothing changes there."""
        return self._disk.versions()

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not agree with what is held."""
        with self._lock:
            assert self._host_bytes == sum(rows.num_bytes for rows in self._host.values())
            assert self._host_bytes <= self._max_host_bytes
            assert not any(load.done() for load in self._loads.values())

    def _run(self, version: AdapterVersion, load: Future[CachedAdapter]) -> None:
        try:
            adapter = self._load(version)
        except BaseException as error:
            with self._lock:
                del self._loads[version]
                if isinstance(error, AdapterCorruptError | AdapterRefusedError):
                    self._failures[version] = (self._clock(), error)
            load.set_exception(error)
            return
        with self._lock:
            del self._loads[version]
            self._keep(version, adapter.rows)
        load.set_result(adapter)

    def _load(self, version: AdapterVersion) -> CachedAdapter:
        stages = StageClock()
        near = self._on_disk(version, stages)
        if near is not None:
            return near
        content = self._registry.content(version, stages)
        if content.num_bytes > self._max_adapter_bytes:
            raise AdapterRefusedError(
                f"the adapter version {version} has {content.num_bytes:,} bytes; at most "
                f"{self._max_adapter_bytes:,} are accepted here"
            )
        files = {
            name: self._registry.read_file(entry, stages) for name, entry in content.files.items()
        }
        rows = _parse(content, files, stages)
        with stages.stage("disk_write"):
            self._disk.write(content, files)
        return CachedAdapter(rows, "registry", stages.stage_s)

    def _on_host(self, version: AdapterVersion) -> CachedAdapter | None:
        rows = self._host.get(version)
        if rows is None:
            return None
        self._host.move_to_end(version)
        return CachedAdapter(rows, "host")

    def _on_disk(self, version: AdapterVersion, stages: StageClock) -> CachedAdapter | None:
        cached = self._disk.read(version, stages)
        if cached is None:
            return None
        return CachedAdapter(_parse(*cached, stages), "disk", stages.stage_s)

    def _keep(self, version: AdapterVersion, rows: AdapterRows) -> None:
        num_bytes = rows.num_bytes
        if version in self._host or num_bytes > self._max_host_bytes:
            return
        self._host[version] = rows
        self._host_bytes += num_bytes
        while self._host_bytes > self._max_host_bytes:
            _, evicted = self._host.popitem(last=False)
            self._host_bytes -= evicted.num_bytes

    def _raise_failure(self, version: AdapterVersion) -> None:
        if version not in self._failures:
            return
        since_s, error = self._failures[version]
        if self._clock() - since_s < FAILURE_KEPT_S:
            # A copy: raising one object again and again would grow its traceback.
            raise copy.copy(error)
        del self._failures[version]


def _parse(content: ManifestContent, files: Mapping[str, bytes], stages: StageClock) -> AdapterRows:
    with stages.stage("parse"):
        return replace(read_peft(files).rows, base_digest=content.base_digest)
