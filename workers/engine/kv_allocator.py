"""What a sequence gets of the KV cache: a slot, blocks for its tokens, and the prefix that others computed already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from workers.attention.blocks import BlockLedger
from workers.attention.slots import SlotLedger
from workers.engine.prefix_keys import PrefixKeys
from workers.engine.sequence import Sequence
from workers.models.runner import KvCopy


class KvAllocator:
    """Keeps `kv_slot`, `blocks` and `num_computed` of sequences together with the ledgers.

    Args:
        prefix_cache: whether full blocks are indexed, and found by others of the same tenant and adapter set.
    """

    def __init__(self, slots: SlotLedger, blocks: BlockLedger, *, prefix_cache: bool) -> None:
        self._slots = slots
        self._blocks = blocks
        self._prefix_cache = prefix_cache
        self._saves: list[KvCopy] = []
        self._restores: list[KvCopy] = []
        self.tokens_reused = 0

    @property
    def num_slots(self) -> int:
        return self._slots.num_slots

    @property
    def slots_used(self) -> int:
        return self._slots.num_used

    @property
    def num_blocks(self) -> int:
        return self._blocks.num_blocks

    @property
    def block_tokens(self) -> int:
        return self._blocks.block_tokens

    @property
    def blocks_held(self) -> int:
        return self._blocks.num_held

    def try_begin(self, sequence: Sequence, running: Collection[Sequence]) -> bool:
        """Give a sequence a slot, and blocks for all tokens that are known of it; its known prefix counts as computed.

        Args:
            running: sequences that are left a block each where they may still grow, or the newcomer would take what
                they need for their next token and be the first to give way.

        Returns False, and changes nothing, where there is no room.
        """
        shared = self._known_prefix(sequence)
        num_new = self._blocks.blocks_for(sequence.num_tokens) - len(shared)
        spare = sum(self._may_grow(one) for one in running)
        if not self._slots.num_free or not self._blocks.can_take(shared, num_new + spare):
            return False
        self._blocks.take(shared)
        sequence.blocks = [*shared, *self._blocks.allocate(num_new)]
        sequence.kv_slot = self._slots.allocate()
        sequence.num_computed = len(shared) * self.block_tokens
        self._slots.grow(sequence.kv_slot, sequence.num_computed)
        self.tokens_reused += sequence.num_computed
        self._restores += [
            KvCopy(block, sequence.kv_slot, number * self.block_tokens)
            for number, block in enumerate(shared)
        ]
        return True

    def try_grow(self, sequence: Sequence) -> bool:
        """See to it that a running sequence has blocks for all tokens known of it. False if none is left."""
        num_new = self._blocks.blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if num_new <= 0:
            return True
        if not self._blocks.can_take((), num_new):
            return False
        sequence.blocks += self._blocks.allocate(num_new)
        return True

    def computed(self, sequence: Sequence, num_new: int) -> None:
        """So many further tokens of a running sequence are in the cache; what they fill of its prompt may be found."""
        slot = _slot(sequence)
        self._slots.grow(slot, num_new)
        before, sequence.num_computed = sequence.num_computed, sequence.num_computed + num_new
        self._index(sequence, before, min(sequence.num_computed, _prompt_tokens(sequence)))

    def release(self, sequence: Sequence) -> None:
        """Take all back from a running sequence; what it computed may be found as long as its place is not needed."""
        slot = _slot(sequence)
        # Its answer's blocks only now, all at once: copying each as it fills would burden decoding.
        self._index(sequence, _prompt_tokens(sequence), sequence.num_computed)
        # The slot may be another's before these copies would have been made. Saves are made before anything else.
        self._restores = [one for one in self._restores if one.kv_slot != slot]
        self._blocks.release(sequence.blocks)
        self._slots.free(slot)
        sequence.blocks = []
        sequence.kv_slot = None
        sequence.num_computed = 0

    def take_copies(self) -> tuple[tuple[KvCopy, ...], tuple[KvCopy, ...]]:
        """The saves and restores that the next step must make, handed out once."""
        copies = tuple(self._saves), tuple(self._restores)
        self._saves, self._restores = [], []
        return copies

    def forget(self) -> None:
        """Nothing that was computed so far is found again. Only with nobody running."""
        self._blocks.forget()
        self._saves, self._restores = [], []

    def check_integrity(self, running: Collection[Sequence]) -> bool:
        """These sequences, and nobody else, hold a slot each with exactly their tokens, and blocks for them."""
        slots = [one.kv_slot for one in running]
        held = Counter(block for one in running for block in one.blocks)
        return (
            self._slots.check_integrity()
            and self._blocks.check_integrity()
            and self._blocks.references() == held
            and len(set(slots)) == len(slots) == self._slots.num_used
            and all(
                one.kv_slot is not None
                and self._slots.tokens(one.kv_slot) == one.num_computed < one.num_tokens
                and one.num_computed <= len(one.blocks) * self.block_tokens
                for one in running
            )
        )

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's first tokens. At least its last token is computed: it brings the logits.

        A request that wants the logits of its whole prompt computes all of it.
        """
        if not self._prefix_cache or sequence.request.wants_prompt_logprobs:
            return []
        keys = self._keys(sequence)
        usable = (sequence.num_tokens - 1) // self.block_tokens
        return self._blocks.lookup(keys[number] for number in range(usable))

    def _index(self, sequence: Sequence, start: int, stop: int) -> None:
        """Let others find the blocks that end at tokens after `start`, up to `stop`."""
        numbers = range(start // self.block_tokens, stop // self.block_tokens)
        if not self._prefix_cache or not numbers:
            return
        keys, slot = self._keys(sequence), _slot(sequence)
        for number in numbers:
            if self._blocks.index(sequence.blocks[number], keys[number]):
                copy = KvCopy(sequence.blocks[number], slot, number * self.block_tokens)
                self._saves.append(copy)

    def _keys(self, sequence: Sequence) -> PrefixKeys:
        if sequence.prefix_keys is None:
            request = sequence.request
            sequence.prefix_keys = PrefixKeys(request.tenant, request.adapters, self.block_tokens)
        if len(sequence.prefix_keys) < sequence.num_tokens // self.block_tokens:
            sequence.prefix_keys.extend([*sequence.request.prompt_token_ids, *sequence.answer])
        return sequence.prefix_keys

    def _may_grow(self, sequence: Sequence) -> bool:
        # The last token of an answer is never stored.
        most = _prompt_tokens(sequence) + sequence.request.sampling.max_tokens - 1
        return len(sequence.blocks) < self._blocks.blocks_for(most)


def _prompt_tokens(sequence: Sequence) -> int:
    return len(sequence.request.prompt_token_ids)


def _slot(sequence: Sequence) -> int:
    if sequence.kv_slot is None:
        raise ValueError(f"request {sequence.request.request_id} is not running")
    return sequence.kv_slot
