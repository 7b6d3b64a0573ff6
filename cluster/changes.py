"""Mappings that many readers follow: each is sent only what changed since it last asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Changes(Generic[K, V]):
    """What differs between two states of a mapping; with `is_whole`, the later state itself."""

    values: Mapping[K, V] = field(default_factory=dict)
    gone: tuple[K, ...] = ()
    is_whole: bool = False

    def applied_to(self, known: Mapping[K, V]) -> Mapping[K, V]:
        """The later state. The same object when nothing changed; `known` itself is never altered."""
        if self.is_whole:
            return self.values
        if not self.values and not self.gone:
            return known
        fresh = {**known, **self.values}
        for key in self.gone:
            fresh.pop(key, None)
        return fresh


class ChangeLog(Generic[K, V]):
    """A mapping and the stamp of each key's last change. Stamps are positive and never fall."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._stamps: dict[K, int] = {}  # also of keys that are gone; last changed last
        self._replaced_by: Mapping[K, V] | None = None  # while nothing else has changed it
        self._forgotten = 0  # who knows nothing newer is sent the whole mapping

    @property
    def values(self) -> Mapping[K, V]:
        """As it is now. Not to be altered, and valid until the next change."""
        return self._values

    def put(self, key: K, value: V, stamp: int) -> None:
        self._values[key] = value
        self._mark(key, stamp)

    def drop(self, key: K, stamp: int) -> None:
        """No error when there is none."""
        if self._values.pop(key, None) is not None:
            self._mark(key, stamp)

    def replace(self, fresh: Mapping[K, V], stamp: int) -> bool:
        """Make the mapping equal to `fresh`, which nobody alters any more; only what differs counts as changed.

        True if anything does.
        """
        if fresh is self._replaced_by:
            return False
        known = self._values.get
        changed = [
            (key, value)
            for key, value in fresh.items()
            if (before := known(key)) is not value and before != value
        ]
        num_new = sum(key not in self._values for key, _ in changed)
        gone = []
        if len(self._values) + num_new != len(fresh):
            gone = [key for key in self._values if key not in fresh]
        for key in gone:
            self.drop(key, stamp)
        for key, value in changed:
            self.put(key, value, stamp)
        self._replaced_by = fresh
        return bool(changed or gone)

    def since(self, stamp: int) -> Changes[K, V]:
        """What changed after `stamp`; the whole for 0. Takes time by the number of changes, unless it is the whole."""
        if stamp <= self._forgotten:
            return Changes(dict(self._values), is_whole=True)
        values: dict[K, V] = {}
        gone: list[K] = []
        for key in reversed(self._stamps):
            if self._stamps[key] <= stamp:
                break
            if key in self._values:
                values[key] = self._values[key]
            else:
                gone.append(key)
        return Changes(values, tuple(gone))

    def _mark(self, key: K, stamp: int) -> None:
        self._replaced_by = None
        self._stamps.pop(key, None)
        self._stamps[key] = stamp
        if len(self._stamps) > 2 * len(self._values) + 1000:
            self._forget_gone()

    def _forget_gone(self) -> None:
        self._forgotten = next(reversed(self._stamps.values())) - 1
        self._stamps = {key: at for key, at in self._stamps.items() if key in self._values}
