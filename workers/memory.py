"""What an engine keeps beside its weights, in bytes, and how one budget is divided. Pure numbers.

The bank of adapter rows, the keys and values of tokens, and the scratch of weight mode: each has a size from the start.
Not counted is what a step holds for a moment (activations and stacked rows of at most `max_step_tokens` tokens and
`max_step_work` rows, logits, all of a prompt's where they were asked for) nor recorded graphs: leave room for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import InvalidRequestError
from workers.bank.pages import NUM_RESERVED
from workers.config import EngineSettings

MAX_ROWS_PER_SLOT = 64
"""A derived bank has no more rows than its slots full of adapters of the largest usual rank."""


@dataclass(frozen=True, slots=True)
class MemoryShape:
    """What things cost in one model, behind one attention back end."""

    row_bytes: int  # one bank row, both sides, in every projection
    token_bytes: int  # keys and values of one token, in every layer
    longest_tokens: int  # of one sequence
    fixed_tokens: (
        int  # that have room whatever the blocks: in slabs, or in the page that is nobody's
    )
    keeps_blocks: (
        bool  # blocks have memory of their own: always as pages, beside slabs for a prefix cache
    )
    scratch_bytes: int

    @classmethod
    def of(
        cls,
        projections: Mapping[str, tuple[int, int]],
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
        longest_tokens: int,
        fixed_tokens: int,
        keeps_blocks: bool,
        scratch_bytes: int,
    ) -> MemoryShape:
        """Of a model whose rows, keys and values have `itemsize` bytes a number."""
        return cls(
            row_bytes=sum(num_in + num_out for num_in, num_out in projections.values()) * itemsize,
            token_bytes=num_layers * 2 * num_kv_heads * head_dim * itemsize,
            longest_tokens=longest_tokens,
            fixed_tokens=fixed_tokens,
            keeps_blocks=keeps_blocks,
            scratch_bytes=scratch_bytes,
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes, and what they take. All bytes are exact but the scratch's, which is a bound."""

    bank_rows: int
    kv_blocks: int
    bank_bytes: int
    kv_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.bank_bytes + self.kv_bytes + self.scratch_bytes

    def __str__(self) -> str:
        return (
            f"{self.total_bytes:,} bytes: {self.bank_bytes:,} for {self.bank_rows:,} bank rows, "
            f"{self.kv_bytes:,} for keys and values, {self.scratch_bytes:,} for scratch"
        )


def plan_memory(settings: EngineSettings, shape: MemoryShape) -> MemoryPlan:
    """The sizes the settings name, and those they leave to `memory_bytes`.

    Where both `bank_rows` and `kv_tokens` are 0, each gets half of what slabs and scratch leave; of that the bank takes
    no more than `MAX_ROWS_PER_SLOT` rows for each slot, and keys and values the remainder.

    Raises:
        InvalidRequestError: the budget is too small, or a size is left to a budget that is not there.
    """
    if not settings.memory_bytes:
        if not settings.bank_rows:
            raise InvalidRequestError(
                "bank_rows is 0, which leaves it to memory_bytes, and that is 0 as well",
                param="engine.bank_rows",
            )
        return _plan(settings, shape, settings.bank_rows, settings.kv_blocks)
    block_bytes = settings.kv_block_tokens * shape.token_bytes * shape.keeps_blocks
    fewest_blocks = -(-shape.longest_tokens // settings.kv_block_tokens)
    fewest = _plan(
        settings,
        shape,
        settings.bank_rows or 1,
        settings.kv_blocks if settings.kv_tokens else fewest_blocks,
    )
    left = settings.memory_bytes - fewest.total_bytes
    if left < 0:
        raise InvalidRequestError(
            f"memory_bytes is {settings.memory_bytes:,}; what the other settings ask for takes at least {fewest}",
            param="engine.memory_bytes",
        )
    bank_rows, kv_blocks = fewest.bank_rows, fewest.kv_blocks
    is_bank_only = bool(settings.kv_tokens) or not block_bytes
    if not settings.bank_rows:
        share = left if is_bank_only else left // 2
        most = max(1, MAX_ROWS_PER_SLOT * settings.bank_slots)
        bank_rows = min(most, bank_rows + share // max(1, shape.row_bytes))
    if not settings.kv_tokens:
        left -= (bank_rows - fewest.bank_rows) * shape.row_bytes
        kv_blocks = kv_blocks + left // block_bytes if block_bytes else settings.kv_blocks
    return _plan(settings, shape, bank_rows, kv_blocks)


def _plan(
    settings: EngineSettings, shape: MemoryShape, bank_rows: int, kv_blocks: int
) -> MemoryPlan:
    block_tokens = kv_blocks * settings.kv_block_tokens * shape.keeps_blocks
    return MemoryPlan(
        bank_rows=bank_rows,
        kv_blocks=kv_blocks,
        bank_bytes=(bank_rows + NUM_RESERVED) * shape.row_bytes,
        kv_bytes=(shape.fixed_tokens + block_tokens) * shape.token_bytes,
        scratch_bytes=shape.scratch_bytes,
    )
