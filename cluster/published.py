"""What the registry has published, read whole and only when it changed. No threads, no Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.table import AdapterFacts, AliasKey
from storage.errors import AdapterCorruptError
from storage.history import newest_good, versions_of
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import ManifestContent
from storage.registry import Registry
from storage.summary import VersionSummary, pages_of

REREAD_S = 60.0
"""A publisher that died before announcing its publish is still heard of after this long."""

_log = logging.getLogger(__name__)


def facts_of(content: ManifestContent) -> AdapterFacts:
    """What is known of a version that was found by its digest alone."""
    return AdapterFacts(rows=pages_of(content), num_bytes=content.num_bytes)


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """One adapter: what its aliases mean, and its versions, oldest first.

    `history`: alias → what it meant before, newest first; deleted versions are left out. `pinned_copies`: on how many
    replicas an administrator wants it, 0 for none.
    """

    name: AdapterName
    aliases: Mapping[str, AdapterVersion] = field(default_factory=dict)
    versions: tuple[VersionSummary, ...] = ()
    history: Mapping[str, tuple[AdapterVersion, ...]] = field(default_factory=dict)
    pinned_copies: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """All adapters of a registry at one generation. `quarantined`: version → why it must not be served."""

    generation: int = -1
    adapters: Mapping[AdapterName, PublishedAdapter] = field(default_factory=dict)
    quarantined: Mapping[AdapterVersion, str] = field(default_factory=dict)

    @property
    def desired(self) -> dict[AliasKey, AdapterVersion]:
        """Where every alias should point: at its newest version that can be read and is not in quarantine.

        An alias without such a version is left out.
        """
        facts = self.facts
        desired = {}
        for name, adapter in self.adapters.items():
            for alias, version in adapter.aliases.items():
                found = newest_good(
                    (version, *adapter.history.get(alias, ())),
                    lambda each: each in facts and each not in self.quarantined,
                )
                if found is not None:
                    desired[name.tenant, name.name, alias] = found
        return desired

    @property
    def facts(self) -> dict[AdapterVersion, AdapterFacts]:
        return {
            summary.version: AdapterFacts(rows=summary.pages, num_bytes=summary.num_bytes)
            for adapter in self.adapters.values()
            for summary in adapter.versions
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
        fresh = Published(generation, adapters, self._registry.quarantined())
        if fresh != self._last:
            self._last = fresh
        return self._last

    def _read_adapter(self, name: AdapterName) -> PublishedAdapter | None:
        try:
            aliases = self._registry.aliases(name)
            meant = {alias: versions_of(record) for alias, record in aliases.items()}
            return PublishedAdapter(
                name,
                {alias: versions[0] for alias, versions in meant.items()},
                tuple(VersionSummary.of(manifest) for manifest in self._registry.versions(name)),
                {alias: versions[1:] for alias, versions in meant.items()},
                self._registry.pinned_copies(name),
            )
        except AdapterCorruptError as error:
            _log.error("adapter %s keeps what it had: %s", name, error.message)
            return self._last.adapters.get(name)
