"""One budget for the bank, keys and values and scratch: summed exactly, kept, and refused by numbers when too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InvalidRequestError
from tests.workers.engine.small_engine import small_engine
from workers.config import EngineSettings
from workers.memory import MAX_ROWS_PER_SLOT, MemoryShape, plan_memory

SLABS = MemoryShape(
    row_bytes=1000,
    token_bytes=50,
    longest_tokens=128,
    fixed_tokens=4 * 128,
    keeps_blocks=True,
    scratch_bytes=7000,
)
PAGES = MemoryShape(
    row_bytes=1000,
    token_bytes=50,
    longest_tokens=128,
    fixed_tokens=16,
    keeps_blocks=True,
    scratch_bytes=7000,
)


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(
        **{"max_sequences": 4, "max_sequence_tokens": 128, "bank_slots": 8, **changes}
    )


def test_without_a_budget_the_sizes_are_what_the_settings_say() -> None:
    plan = plan_memory(settings(bank_rows=30), SLABS)
    assert (plan.bank_rows, plan.kv_blocks) == (30, 4 * 128 // 16)
    assert plan.bank_bytes == (30 + 2) * 1000
    assert plan.kv_bytes == (4 * 128 + 4 * 128) * 50
    assert plan.total_bytes == plan.bank_bytes + plan.kv_bytes + 7000


@pytest.mark.parametrize("shape", [SLABS, PAGES])
@given(
    memory_bytes=st.integers(100_000, 5_000_000),
    bank_rows=st.integers(0, 100),
    kv_tokens=st.integers(0, 2000).map(lambda tokens: tokens if tokens >= 128 else 0),
)
def test_a_budget_is_never_exceeded_and_hardly_wasted(
    shape: MemoryShape, memory_bytes: int, bank_rows: int, kv_tokens: int
) -> None:
    wanted = settings(memory_bytes=memory_bytes, bank_rows=bank_rows, kv_tokens=kv_tokens)
    try:
        plan = plan_memory(wanted, shape)
    except InvalidRequestError as error:
        fewest = wanted.model_copy(
            update={"memory_bytes": 0, "bank_rows": bank_rows or 1, "kv_tokens": kv_tokens or 128}
        )
        assert plan_memory(fewest, shape).total_bytes > memory_bytes
        assert f"{memory_bytes:,}" in str(error)
        return
    assert plan.total_bytes <= memory_bytes
    assert plan.bank_rows == (bank_rows or plan.bank_rows) >= 1
    assert plan.kv_blocks == (wanted.kv_blocks if kv_tokens else plan.kv_blocks) >= 1
    left = memory_bytes - plan.total_bytes
    if not kv_tokens:
        assert left < 16 * 50, "less than a block"
    elif not bank_rows:
        assert left < 1000 or plan.bank_rows == MAX_ROWS_PER_SLOT * 8, "less than a row"


def test_what_is_left_to_the_budget_is_halved() -> None:
    plan = plan_memory(settings(memory_bytes=300_000, bank_rows=0), PAGES)
    # Fixed: three rows, one sequence's tokens, a spare page, scratch.
    free = 300_000 - 3 * 1000 - (128 + 16) * 50 - 7000
    assert plan.bank_rows == 1 + free // 2 // 1000
    assert plan.kv_blocks * 16 * 50 >= free // 2


def test_a_budget_that_is_too_small_names_the_numbers() -> None:
    with pytest.raises(InvalidRequestError, match=r"60,000.*258,000 for 256 bank rows") as refused:
        plan_memory(settings(memory_bytes=60_000), PAGES)
    assert refused.value.param == "engine.memory_bytes"
    with pytest.raises(InvalidRequestError, match="memory_bytes") as refused:
        plan_memory(settings(bank_rows=0), PAGES)
    assert refused.value.param == "engine.bank_rows"


def test_the_plan_is_what_an_engine_really_allocates(tiny_llama_dir: Path) -> None:
    engine = small_engine(
        tiny_llama_dir, memory_bytes=12_000_000, bank_rows=0, kv_tokens=0, max_sequences=4
    )
    runner: Any = engine.runner
    plan = runner.memory
    bank = sum(
        rows.nbytes
        for module in engine.bank.modules.values()
        for rows in (module.in_rows_NI, module.out_rows_NO)
    )
    attention = runner._attention
    slabs = [*attention._keys_SKMD, *attention._values_SKMD]
    stores = [store for _, store in attention._store._pairs]
    assert bank == plan.bank_bytes
    assert sum(tensor.nbytes for tensor in (*slabs, *stores)) == plan.kv_bytes
    assert engine.bank.num_rows == plan.bank_rows
    assert engine.load().kv_blocks == plan.kv_blocks
    assert plan.total_bytes <= 12_000_000
    engine.loader.stop()
