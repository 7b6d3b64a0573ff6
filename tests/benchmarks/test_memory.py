"""The memory benchmark measures what it says, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from benchmarks import memory
from storage.base_checkpoint import read_base_facts


def test_every_tier_of_every_family_is_held_to_the_formula(tiny_llama_dir: Path) -> None:
    projections = read_base_facts(tiny_llama_dir).projections
    rows = {row.name: row for row in memory.state_rows(projections)}
    for kind in memory.KINDS:
        assert rows[f"{kind}: host / formula"].value == 1.0
        assert rows[f"{kind}: device / formula"].value == 1.0
    assert rows["LoRA r8: file / formula"].value == 1.0
    assert memory.Kind("LoRA", 3).state_bytes({"q": (10, 20)}) == 2 * 3 * 30
    assert memory.Kind("DoRA", 3).state_bytes({"q": (10, 20)}) == 2 * (3 * 30 + 20)
    assert memory.Kind("IA3", 1).state_bytes({"v_proj": (10, 20), "q_proj": (9, 9)}) == 2 * 20


def test_growth_is_told_for_every_round_after_the_warm_up() -> None:
    row = memory.growth_row(2, "float32")
    assert len(row.rounds) == 2
    assert all(ratio > 0.5 for ratio in row.rounds)
