"""Who holds which block of the KV cache: pure accounting, the same for every attention back end.

A block is held by the sequences that reference it. One that is full may be indexed under a key that says what it holds
(`prefix_keys.py`); nobody writes to it again, so sequences may share it, and it stays when the last of them leaves,
until its place is needed: least recently used first. The ledger knows neither tokens nor tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NewType

BlockKey = NewType("BlockKey", bytes)
"""What a full block holds: the same key never stands for other contents."""


class BlockLedger:
    """Blocks 0 to `num_blocks` - 1, of `block_tokens` tokens each."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references: dict[int, int] = {}  # of held blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # indexed, not held; oldest use first
        self._by_key: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds: what `allocate` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return len(self._references)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens need."""
        return -(-num_tokens // self.block_tokens)

    def lookup(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks of the leading keys that are indexed, up to the first that is not. Changes nothing."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def can_take(self, shared: Sequence[int], num_new: int) -> bool:
        """Whether `take(shared)` and then `allocate(num_new)` would succeed."""
        idle = sum(block in self._idle for block in shared)
        return num_new <= self.num_available - idle

    def take(self, shared: Sequence[int]) -> None:
        """Hold blocks that `lookup` found, one reference more each. Raises KeyError if one is not indexed."""
        for block in shared:
            self._key_of[block]
        for block in shared:
            self._idle.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1

    def allocate(self, count: int) -> list[int]:
        """Blocks of one's own, forgetting idle ones where none is free.

        Raises LookupError, and changes nothing, when there are not so many: ask `can_take` first.
        """
        if count > self.num_available:
            raise LookupError(f"{count} KV blocks are wanted, {self.num_available} are not held")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._by_key[self._key_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def index(self, block: int, key: BlockKey) -> bool:
        """Let others find a held block that is full now.

        Returns False, and changes nothing, where another block is found under that key already.
        Raises KeyError if the block is not held, ValueError if it is indexed under another key.
        """
        self._references[block]
        if self._key_of.get(block, key) != key:
            raise ValueError(f"block {block} is indexed under another key")
        if key in self._by_key:
            return False
        self._by_key[key] = block
        self._key_of[block] = key
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, one reference each. Raises KeyError if one is not held.

        The last of them is forgotten first: a chain is found from its head.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """Nothing is found from now on; who holds a block keeps it."""
        self._free += self._idle
        self._idle.clear()
        self._by_key.clear()
        self._key_of.clear()

    def references(self) -> dict[int, int]:
        """How often each held block is held."""
        return dict(self._references)

    def check_integrity(self) -> bool:
        """Every block is free, idle or held, and only one of them; keys and blocks agree."""
        places = [*self._free, *self._idle, *self._references]
        return (
            sorted(places) == list(range(self.num_blocks))
            and all(count > 0 for count in self._references.values())
            and {block: key for key, block in self._by_key.items()} == self._key_of
            and self._idle.keys() <= self._key_of.keys()
            and not self._key_of.keys() & set(self._free)
        )
