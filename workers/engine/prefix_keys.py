"""The names of full KV blocks: a hash chain, so that a key stands for every token up to the end of its block.

The chain begins with the tenant and the digest of the adapter set (versions and weights), so no key is ever the same
for two tenants, two adapters or two versions. Keys are cryptographic: a collision would be another's answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

from storage.identity import AdapterSet, canonical_json
from workers.attention.blocks import BlockKey


class PrefixKeys:
    """The keys of one sequence's full blocks, computed once each as its tokens become known."""

    def __init__(self, tenant: str, adapters: AdapterSet, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._root = BlockKey(sha256(canonical_json([tenant, adapters.digest])).digest())
        self._keys: list[BlockKey] = []

    def __getitem__(self, block: int) -> BlockKey:
        """Of the block with that number in the sequence. Raises IndexError if `extend` has not reached it."""
        return self._keys[block]

    def __len__(self) -> int:
        return len(self._keys)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append the keys of all further blocks that `tokens`, the sequence from its beginning, fill."""
        size = self._block_tokens
        for start in range(len(self._keys) * size, len(tokens) - size + 1, size):
            parent = self._keys[-1] if self._keys else self._root
            block = array("q", tokens[start : start + size]).tobytes()
            self._keys.append(BlockKey(sha256(parent + block).digest()))
