"""KV blocks are never lost, never given to two by accident, and found only as long as they hold what their key says."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.attention.blocks import BlockKey, BlockLedger

NUM_BLOCKS, BLOCK_TOKENS = 7, 4


def key(number: int) -> BlockKey:
    return BlockKey(bytes([number]))


class LedgerMachine(RuleBasedStateMachine):
    """Sequences hold lists of blocks; what was written to a block is remembered beside the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(NUM_BLOCKS, BLOCK_TOKENS)
        self.held: list[list[int]] = []
        self.contents: dict[int, BlockKey | None] = dict.fromkeys(range(NUM_BLOCKS))

    @rule(keys=st.lists(st.integers(0, 9), max_size=4), num_new=st.integers(0, 5))
    def begin(self, keys: list[int], num_new: int) -> None:
        wanted = [key(number) for number in keys]
        shared = self.ledger.lookup(wanted)
        assert [self.contents[block] for block in shared] == wanted[: len(shared)]
        shared = list(dict.fromkeys(shared))
        if not self.ledger.can_take(shared, num_new):
            self.ledger.take(shared)
            with pytest.raises(LookupError):
                self.ledger.allocate(num_new)
            self.ledger.release(shared)
            return
        self.ledger.take(shared)
        taken = {block for blocks in self.held for block in blocks} | set(shared)
        new = self.ledger.allocate(num_new)
        assert not taken & set(new)
        for block in new:
            self.contents[block] = None
        self.held.append(shared + new)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), number=st.integers(0, 9))
    def fill(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.held for block in blocks]))
        if self.contents[block] is not None:
            return
        is_new = not self.ledger.lookup([key(number)])
        assert self.ledger.index(block, key(number)) == is_new
        if is_new:
            self.contents[block] = key(number)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.held) - 1))
        self.ledger.release(self.held.pop(which))

    @rule()
    def forget(self) -> None:
        self.ledger.forget()
        self.contents = dict.fromkeys(range(NUM_BLOCKS))
        assert not any(self.ledger.lookup([key(number)]) for number in range(10))

    @invariant()
    def books_agree(self) -> None:
        assert self.ledger.check_integrity()
        counts: dict[int, int] = {}
        for block in (block for blocks in self.held for block in blocks):
            counts[block] = counts.get(block, 0) + 1
        assert self.ledger.references() == counts
        assert self.ledger.num_held + self.ledger.num_available == NUM_BLOCKS

    def teardown(self) -> None:
        for blocks in self.held:
            self.ledger.release(blocks)
        assert self.ledger.num_available == NUM_BLOCKS
        assert self.ledger.check_integrity()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def filled(ledger: BlockLedger, numbers: list[int]) -> list[int]:
    blocks = ledger.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        ledger.index(block, key(number))
    return blocks


def test_the_chain_used_longest_ago_is_forgotten_from_its_end() -> None:
    ledger = BlockLedger(4, BLOCK_TOKENS)
    old, recent = filled(ledger, [0, 1]), filled(ledger, [2, 3])
    ledger.release(old)
    ledger.release(recent)
    ledger.allocate(1)
    assert ledger.lookup([key(0), key(1)]) == old[:1]
    assert ledger.lookup([key(2), key(3)]) == recent
    ledger.take(old[:1])
    ledger.release(old[:1])
    ledger.allocate(2)
    assert ledger.lookup([key(0)]) == old[:1]
    assert ledger.lookup([key(2)]) == []


def test_a_shared_block_stays_until_the_last_has_left() -> None:
    ledger = BlockLedger(1, BLOCK_TOKENS)
    blocks = filled(ledger, [0])
    ledger.take(ledger.lookup([key(0)]))
    ledger.release(blocks)
    assert ledger.num_available == 0
    with pytest.raises(LookupError, match="1 KV blocks are wanted, 0 are not held"):
        ledger.allocate(1)
    ledger.release(blocks)
    assert ledger.allocate(1) == blocks
    assert ledger.lookup([key(0)]) == []


def test_what_is_not_held_is_neither_indexed_nor_released_nor_shared() -> None:
    ledger = BlockLedger(2, BLOCK_TOKENS)
    for act in (
        lambda: ledger.index(0, key(0)),
        lambda: ledger.release([0]),
        lambda: ledger.take([0]),
    ):
        with pytest.raises(KeyError):
            act()
    (block,) = filled(ledger, [0])
    with pytest.raises(ValueError, match="another key"):
        ledger.index(block, key(1))
