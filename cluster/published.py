"""What the registry has published, read whole and only when it changed. No threads, no Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.table import AdapterFacts, AliasKey
from storage.errors import AdapterCorruptError
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import Manifest, ManifestContent
from storage.registry import Registry

REREAD_S = 60.0
"""A publisher that died before announcing its publish is still heard of after this long."""

_log = logging.getLogger(__name__)


def facts_of(content: ManifestContent) -> AdapterFacts:
    return AdapterFacts(rows=content.max_rank, num_bytes=content.num_bytes)


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """One adapter: what its aliases mean, and its versions, oldest first."""

    name: AdapterName
    aliases: Mapping[str, AdapterVersion] = field(default_factory=dict)
    versions: tuple[Manifest, ...] = ()


@dataclass(frozen=True, slots=True)
class Published:
    """All adapters of a registry at one generation."""

    generation: int = -1
    adapters: Mapping[AdapterName, PublishedAdapter] = field(default_factory=dict)

    @property
    def desired(self) -> dict[AliasKey, AdapterVersion]:
        """Where every alias should point. A version that cannot be read is left out."""
        known = self.facts
        return {
            (name.tenant, name.name, alias): version
            for name, adapter in self.adapters.items()
            for alias, version in adapter.aliases.items()
            if version in known
        }

    @property
    def facts(self) -> dict[AdapterVersion, AdapterFacts]:
        return {
            manifest.version: facts_of(manifest.content)
            for adapter in self.adapters.values()
            for manifest in adapter.versions
        }


class PublishedReader:
    """Reads a registry's adapters. One caller at a time.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._last = Published()
        self._read_s = -math.inf

    def read(self) -> Published:
        """What is published now; the same object as the last time when nothing has changed.

        An adapter whose records are damaged stays as it was read before.

        Raises:
            StoreUnavailableError: the registry cannot be reached.
        """
        # Taken before the adapters are read: a change in between is then read again, never missed.
        generation = self._registry.generation()
        if generation == self._last.generation and self._clock() - self._read_s < REREAD_S:
            return self._last
        adapters = {}
        for name in self._registry.names():
            adapter = self._read_adapter(name)
            if adapter is not None:
                adapters[name] = adapter
        self._read_s = self._clock()
        fresh = Published(generation, adapters)
        if fresh != self._last:
            self._last = fresh
        return self._last

    def _read_adapter(self, name: AdapterName) -> PublishedAdapter | None:
        try:
            aliases = self._registry.aliases(name)
            return PublishedAdapter(
                name,
                {alias: AdapterVersion(record.version) for alias, record in aliases.items()},
                tuple(self._registry.versions(name)),
            )
        except AdapterCorruptError as error:
            _log.error("adapter %s keeps what it had: %s", name, error.message)
            return self._last.adapters.get(name)
