"""What the registry has published, as placement and the HTTP doors need it, followed change by change. No Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cluster.table import AdapterFacts, AliasKey
from storage.identity import DEFAULT_ALIAS, AdapterName, AdapterVersion
from storage.index_entry import AdapterEntry
from storage.index_reader import IndexState
from storage.manifest import ManifestContent
from storage.registry import Registry
from storage.summary import VersionSummary, pages_of


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


@dataclass(frozen=True)
class Published:
    """All adapters of a registry at one generation. `quarantined`: version → why it must not be served."""

    generation: int = -1
    adapters: Mapping[AdapterName, PublishedAdapter] = field(default_factory=dict)
    quarantined: Mapping[AdapterVersion, str] = field(default_factory=dict)

    @property
    def aliases(self) -> dict[AliasKey, AdapterVersion]:
        """Where every alias points, whether that can be served or not."""
        return {
            (name.tenant, name.name, alias): version
            for name, adapter in self.adapters.items()
            for alias, version in adapter.aliases.items()
        }

    @property
    def history(self) -> dict[AliasKey, tuple[AdapterVersion, ...]]:
        """What every alias meant before, newest first."""
        return {
            (name.tenant, name.name, alias): versions
            for name, adapter in self.adapters.items()
            for alias, versions in adapter.history.items()
            if versions
        }

    @property
    def pins(self) -> dict[AliasKey, int]:
        """On how many replicas an administrator wants what an adapter's default alias serves."""
        return {
            (name.tenant, name.name, DEFAULT_ALIAS): adapter.pinned_copies
            for name, adapter in self.adapters.items()
            if adapter.pinned_copies
        }

    @cached_property
    def facts(self) -> Mapping[AdapterVersion, AdapterFacts]:
        return {
            version: facts
            for adapter in self.adapters.values()
            for version, facts in _facts_of(adapter).items()
        }


class PublishedReader:
    """Follows a registry's index. One caller at a time; a change costs what changed, and copies of two dictionaries.

    Args:
        registry: where adapters are published; says by its clock when to compare its index with the records.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._index = IndexState()
        self._last = Published()
        self._owners: Counter[AdapterVersion] = Counter()  # names each version has

    def read(self) -> Published:
        """What is published now; the same object as the last time when nothing has changed.

        An adapter whose records are damaged stays as it was read before.

        Raises:
            StoreUnavailableError: the registry cannot be reached.
        """
        index = self._registry.index()
        if index is not self._index:
            self._last = self._followed(index)
            self._index = index
        return self._last

    def _followed(self, index: IndexState) -> Published:
        before, after = self._index.adapters, index.adapters
        changed = [name for name in before if after.get(name) is not before[name]]
        changed += [name for name in after if name not in before]
        last = self._last
        facts = dict(last.facts)
        fresh = {name: _adapter(name, after[name]) for name in changed if name in after}
        for name in changed:
            if name in last.adapters:
                self._owners.subtract(_facts_of(last.adapters[name]).keys())
        for adapter in fresh.values():
            facts |= _facts_of(adapter)
            self._owners.update(_facts_of(adapter).keys())
        for version in [each for each, count in self._owners.items() if count == 0]:
            del facts[version], self._owners[version]
        adapters = {name: fresh.get(name) or last.adapters[name] for name in after}
        published = Published(index.generation, adapters, index.quarantined)
        vars(published)["facts"] = facts
        return published


def _adapter(name: AdapterName, entry: AdapterEntry) -> PublishedAdapter:
    return PublishedAdapter(
        name,
        {alias: meant.version for alias, meant in entry.aliases.items()},
        entry.versions,
        {alias: meant.earlier for alias, meant in entry.aliases.items()},
        entry.pinned_copies,
    )


def _facts_of(adapter: PublishedAdapter) -> dict[AdapterVersion, AdapterFacts]:
    return {
        summary.version: AdapterFacts(rows=summary.pages, num_bytes=summary.num_bytes)
        for summary in adapter.versions
    }
