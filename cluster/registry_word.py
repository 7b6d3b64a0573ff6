"""What the registry says at one moment, as far as placement must know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.table import AdapterFacts, AliasKey
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class RegistryWord:
    """Not to be altered by whoever made it.

    `desired`: where each alias should point. `history`: what it meant before, newest first. `facts`: every version that
    can be read. `quarantined`: versions that must not be served, and why. `pins`: on how many replicas what an alias
    serves is to be held, whoever asks for it.
    """

    desired: Mapping[AliasKey, AdapterVersion] = field(default_factory=dict)
    facts: Mapping[AdapterVersion, AdapterFacts] = field(default_factory=dict)
    history: Mapping[AliasKey, tuple[AdapterVersion, ...]] = field(default_factory=dict)
    quarantined: Mapping[AdapterVersion, str] = field(default_factory=dict)
    pins: Mapping[AliasKey, int] = field(default_factory=dict)
    _largest: dict[int, int] = field(default_factory=dict, compare=False)

    def choices(self, key: AliasKey) -> tuple[AdapterVersion, ...]:
        """All an alias may serve, the most wished for first."""
        return (self.desired[key], *self.history.get(key, ()))

    def largest_within(self, rows: int) -> int:
        """Rows of the largest adapter that a bank of so many rows can hold."""
        if rows not in self._largest:
            sizes = (facts.rows for facts in self.facts.values() if facts.rows <= rows)
            self._largest[rows] = max(sizes, default=0)
        return self._largest[rows]
