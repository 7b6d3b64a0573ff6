"""Who may write where in the KV cache: pure accounting of slots and tokens, for any attention back end."""

from __future__ import annotations

import heapq


class SlotLedger:
    """Slots of equal size, the lowest free one first, so that running sequences stand close together."""

    def __init__(self, num_slots: int, max_tokens_per_slot: int) -> None:
        self.num_slots = num_slots
        self.max_tokens_per_slot = max_tokens_per_slot
        self._free = list(range(num_slots))
        self._tokens: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._tokens)

    def allocate(self) -> int:
        """An empty slot of one's own until `free`. Raises LookupError when none is free: ask `num_free` first."""
        if not self._free:
            raise LookupError("no KV slot is free")
        slot = heapq.heappop(self._free)
        self._tokens[slot] = 0
        return slot

    def tokens(self, slot: int) -> int:
        """How many tokens the slot holds. Raises KeyError if it is not allocated."""
        return self._tokens[slot]

    def grow(self, slot: int, num_tokens: int) -> None:
        """Add tokens to an allocated slot. Raises ValueError if they do not fit; nothing changes then."""
        total = self._tokens[slot] + num_tokens
        if num_tokens < 0 or total > self.max_tokens_per_slot:
            raise ValueError(f"{total} tokens in a slot of {self.max_tokens_per_slot}")
        self._tokens[slot] = total

    def free(self, slot: int) -> None:
        """Give the slot back. Raises KeyError if it is not allocated."""
        del self._tokens[slot]
        heapq.heappush(self._free, slot)

    def check_integrity(self) -> bool:
        """Every slot is either free or used, once, and none is overfull."""
        return sorted([*self._free, *self._tokens]) == list(range(self.num_slots)) and all(
            0 <= count <= self.max_tokens_per_slot for count in self._tokens.values()
        )
