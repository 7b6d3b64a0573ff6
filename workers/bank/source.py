"""Where a loader gets adapters from, and what it wants to know of that place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterVersion
from storage.load_stages import Stage


class FetchedAdapter(Protocol):
    """An adapter's rows, where they were found (host, disk or registry), and how long each stage of that took."""

    @property
    def rows(self) -> AdapterRows: ...

    @property
    def tier(self) -> str: ...

    @property
    def stage_s(self) -> Mapping[Stage, float]: ...


class AdapterSource(Protocol):
    """Called from the loader's threads, once at a time per version. May take seconds and raise any of our errors."""

    def find_near(self, version: AdapterVersion) -> FetchedAdapter | None:
        """From memory or this machine's disk, without waiting for what is far; None where it is on neither, or
        StoreUnavailableError where it is known besides that what is far cannot be reached.
        """

    def get(self, version: AdapterVersion) -> FetchedAdapter:
        """From wherever it is; afterwards it is near."""


class AdapterTiers(AdapterSource, Protocol):
    """A source that can tell what it keeps near: `storage.adapter_cache.AdapterCache`. Any method from any thread."""

    def host_versions(self) -> Collection[AdapterVersion]: ...

    def disk_versions(self) -> Collection[AdapterVersion]: ...

    def is_registry_up(self) -> bool:
        """Whether what is far could be fetched now, as far as is known."""
