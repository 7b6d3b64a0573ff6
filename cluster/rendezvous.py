"""Rendezvous (highest random weight) hashing: each adapter ranks all replicas, and everybody computes the same ranking.

A replica that leaves or joins changes no other pair's order, so only its own adapters move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from functools import lru_cache

from storage.identity import AdapterVersion

_MASK = (1 << 64) - 1
_MIX = 0xD6E8FEB86659FD93  # of Stafford's and Evensen's 64-bit finalisers


@lru_cache(maxsize=1 << 12)
def _seed(name: str) -> int:
    """64 bits of a digest, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def weight(version: AdapterVersion, replica_id: str) -> int:
    """The weight of a pair: 64 mixed bits. A version is a digest already."""
    return _weight(int(version[:16], 16), _seed(replica_id))


def _weight(version_bits: int, replica_bits: int) -> int:
    bits = version_bits ^ replica_bits
    bits = ((bits ^ (bits >> 32)) * _MIX) & _MASK
    bits = ((bits ^ (bits >> 32)) * _MIX) & _MASK
    return bits ^ (bits >> 32)


def preference(version: AdapterVersion, replica_ids: Iterable[str]) -> list[str]:
    """All of `replica_ids`, the adapter's first choice first."""
    bits = int(version[:16], 16)
    weighed = sorted((-_weight(bits, _seed(name)), name) for name in replica_ids)
    return [name for _, name in weighed]


class Rankings:
    """`preference` over one set of replicas, remembered for so many versions until the set changes."""

    def __init__(self, most: int = 1 << 14) -> None:
        self._most = most
        self._replicas: frozenset[str] = frozenset()
        self._known: dict[AdapterVersion, list[str]] = {}

    def of(self, version: AdapterVersion, replica_ids: Collection[str]) -> list[str]:
        """The same list at every call: not to be changed."""
        if replica_ids != self._replicas and frozenset(replica_ids) != self._replicas:
            self._replicas = frozenset(replica_ids)
            self._known.clear()
        ranking = self._known.get(version)
        if ranking is None:
            if len(self._known) >= self._most:
                del self._known[next(iter(self._known))]
            ranking = self._known[version] = preference(version, replica_ids)
        return ranking
