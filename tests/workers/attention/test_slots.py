"""KV slots never leak and never hold more than they can, whatever is asked in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.slots import SlotLedger


@given(st.lists(st.tuples(st.sampled_from(["allocate", "grow", "free"]), st.integers(0, 5))))
def test_random_use_keeps_the_books(steps: list[tuple[str, int]]) -> None:
    ledger = SlotLedger(num_slots=3, max_tokens_per_slot=7)
    held: dict[int, int] = {}
    for action, number in steps:
        if action == "allocate" and ledger.num_free:
            slot = ledger.allocate()
            assert slot == min(set(range(3)) - set(held))
            held[slot] = 0
        elif held:
            slot = sorted(held)[number % len(held)]
            if action == "free":
                ledger.free(slot)
                del held[slot]
            elif held[slot] + number > 7:
                with pytest.raises(ValueError, match="slot of 7"):
                    ledger.grow(slot, number)
            else:
                ledger.grow(slot, number)
                held[slot] += number
        assert ledger.check_integrity()
        assert {slot: ledger.tokens(slot) for slot in held} == held
        assert (ledger.num_used, ledger.num_free) == (len(held), 3 - len(held))


def test_a_slot_is_not_freed_twice_nor_allocated_beyond_the_last() -> None:
    ledger = SlotLedger(num_slots=1, max_tokens_per_slot=4)
    slot = ledger.allocate()
    with pytest.raises(LookupError):
        ledger.allocate()
    ledger.free(slot)
    with pytest.raises(KeyError):
        ledger.free(slot)
