"""Rendezvous (highest random weight) hashing: each adapter ranks all replicas, and everybody computes the same ranking.

A replica that leaves or joins changes no other pair's order, so only its own adapters move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from storage.identity import AdapterVersion


@lru_cache(maxsize=1 << 17)
def weight(version: AdapterVersion, replica_id: str) -> int:
    """The weight of a pair: 64 bits of a digest, the same in every process (unlike `hash`)."""
    pair = f"{version}\0{replica_id}".encode()
    return int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest())


def preference(version: AdapterVersion, replica_ids: Iterable[str]) -> list[str]:
    """All of `replica_ids`, the adapter's first choice first."""
    return sorted(replica_ids, key=lambda replica_id: (-weight(version, replica_id), replica_id))
