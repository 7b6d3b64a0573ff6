"""The seam between the engine and a model: one step in, logits out.

Back ends: `hf` (any transformers causal model; the reference) and `native` (the Llama shape; the fast one).
The engine knows no other way to reach a model.

Shape legend: T tokens in the step, L positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from workers.row_form.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """The new tokens of one sequence in a step, which stand together in the token stream."""

    kv_slot: int
    num_cached: int  # tokens already in the KV cache: the position of the first new one
    num_new: int
    blocks: tuple[int, ...] = ()  # its KV blocks in order, enough for num_total tokens

    @property
    def num_total(self) -> int:
        return self.num_cached + self.num_new


@dataclass(frozen=True, slots=True)
class KvCopy:
    """One full block of a sequence's keys and values, which stand at tokens [start, start + block) of its KV slot."""

    block: int
    kv_slot: int
    start: int  # a multiple of the block's tokens


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step of a decoder: spans in stream order, their tokens and positions, and who each token belongs to.

    Before the forward, first all of `kv_saves` (slot → block; what earlier steps wrote, also of a sequence that is gone
    since), then all of `kv_restores` (block → slot). Where a block is the page itself there is nothing to copy.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    spans: tuple[SequenceSpan, ...]
    plan: StepPlan
    logits_of_L: Tensor  # int64: indices into T
    kv_saves: tuple[KvCopy, ...] = ()
    kv_restores: tuple[KvCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the engine and the bank must know about a model before the first step."""

    vocab_size: int
    max_positions: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    projections: dict[str, tuple[int, int]]  # logical projection path → (in, out) features
    eos_token_ids: frozenset[int]


class ModelRunner(Protocol):
    """A loaded model with a KV cache of its own. One thread at a time."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def base_digest(self) -> str:
        """sha256 of the checkpoint's tensors: what FLoRA, HiRA and DoRA adapters are bound to."""

    def forward(self, step: StepInput) -> Tensor:
        """Run one step, write its keys and values to the cache, return float32 (or float64) logits_LV.

        The logits are valid until the next call. A request's logits do not depend on what else is in the step,
        up to the last bits of the arithmetic.
        """
