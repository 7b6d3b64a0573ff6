"""Row mode or weight mode: which computes a run of tokens cheaper. By cost, never by family.

Costs are counted in base-GEMM rows: one unit is the time one more row takes in `x @ W0.T`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

_THIN_PRODUCT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CostModel:
    """Fixed costs, so that a run's mode depends only on its own length and ranks, never on its neighbours.

    Row mode runs `tokens · rank` rows beside the base product. Weight mode runs `tokens` rows against
    ΔW = W0 ∘ Σ a_j b_jᵀ (none beside the base product when `merged`), after building ΔW.
    """

    build_rows: float
    build_rows_per_rank: float
    merged: bool = False
    """Weight mode uses W0 ∘ (offset + Σ a_j b_jᵀ) at once. Exact enough in float32 only; never for 16 bits."""
    thin_product_tokens: int = _THIN_PRODUCT_TOKENS
    """From this many tokens on, add rows are two thin products rather than gathered rows."""

    def prefers_weight_mode(self, num_tokens: int, num_mul: int, offset: int) -> bool:
        if num_mul == 0:
            return False
        row_mode = num_tokens * (num_mul + offset)
        products = 1 if self.merged else 2
        build = self.build_rows + self.build_rows_per_rank * num_mul
        return num_tokens * products + build < row_mode

    def prefers_thin_product(self, num_tokens: int, num_add: int) -> bool:
        return num_add > 0 and num_tokens >= self.thin_product_tokens


KERNEL_COST = CostModel(build_rows=96.0, build_rows_per_rank=1.0)
"""Of the GPU kernels, counted and not measured: in weight mode a tile of W0 enters two products instead of `rank + 1`,
a small product makes its delta on the way, and half a tile of tokens may not be there."""


def cost_model_for(
    dtype: torch.dtype, *, training: bool = False, thin_products: bool = True
) -> CostModel:
    """Measured once on an x86 CPU with AMX: building ΔW takes as long as about 50 float32 or 250 bfloat16 rows.

    Args:
        dtype: of the base weights.
        training: merge in float32, where a step then needs three products instead of five.
        thin_products: false where the product takes add rows token by token only, as compiled loops do.
    """
    from_tokens = _THIN_PRODUCT_TOKENS if thin_products else sys.maxsize
    if dtype == torch.bfloat16:
        return CostModel(250.0, 2.0, thin_product_tokens=from_tokens)
    return CostModel(50.0, 0.5, merged=training, thin_product_tokens=from_tokens)
