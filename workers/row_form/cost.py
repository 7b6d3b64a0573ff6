"""Row mode or weight mode: which computes a run of tokens cheaper. By cost, never by family.

Costs are counted in base-GEMM rows: one unit is the time one more row takes in `x @ W0.T`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

THIN_PRODUCT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CostModel:
    """Fixed costs, so that a run's mode depends only on its own length and ranks, never on its neighbours.

    Row mode runs `tokens · rank` rows beside the base product. Weight mode runs `tokens` rows against
    ΔW = W0 ∘ Σ a_j b_jᵀ (none beside the base product when `merged`), after building ΔW.

    `product_row`: a row of that second product, which is not packed, beside a row of the base's.
    """

    build_rows: float
    build_rows_per_rank: float
    product_row: float = 1.0
    merged: bool = False
    """Weight mode uses W0 ∘ (offset + Σ a_j b_jᵀ) at once. Exact enough in float32 only; never for 16 bits."""
    thin_product_tokens: int = THIN_PRODUCT_TOKENS
    """From this many tokens on, add rows are two thin products rather than gathered rows."""

    def prefers_weight_mode(self, num_tokens: int, num_mul: int, offset: int) -> bool:
        return num_mul > 0 and self._weight_mode(num_tokens, num_mul) < num_tokens * (
            num_mul + offset
        )

    def rows(self, num_tokens: int, num_mul: int, offset: int) -> float:
        """What a run takes in the mode it is computed in, of `mul` rows and the base's own."""
        if self.prefers_weight_mode(num_tokens, num_mul, offset):
            return self._weight_mode(num_tokens, num_mul)
        return float(num_tokens * (num_mul + offset))

    def _weight_mode(self, num_tokens: int, num_mul: int) -> float:
        products = self.product_row + (0.0 if self.merged else 1.0)
        return num_tokens * products + self.build_rows + self.build_rows_per_rank * num_mul

    def prefers_thin_product(self, num_tokens: int, num_add: int) -> bool:
        return num_add > 0 and num_tokens >= self.thin_product_tokens


ROW_MODE = CostModel(build_rows=math.inf, build_rows_per_rank=0.0, thin_product_tokens=sys.maxsize)
"""One mode whatever the run's length, which depends on how a busy engine cuts a prompt."""

KERNEL_COST = CostModel(build_rows=96.0, build_rows_per_rank=1.0)
"""Of the GPU kernels, counted and not measured: in weight mode a tile of W0 enters two products instead of `rank + 1`,
a small product makes its delta on the way, and half a tile of tokens may not be there."""


def training_cost(dtype: torch.dtype) -> CostModel:
    """Measured on an x86 CPU with AMX by the time of a whole training step, forward and backward.

    In bfloat16 a row costs little on the matrix unit, so building ΔW twice takes as long as 1,100 of them, and a second
    product of a token, whose weight is not packed, as long as two. In float32 building takes as long as about 150 rows,
    and weights are merged: a step then needs three products instead of five. `benchmarks.training_modes` times both
    modes on either side of the crossing.
    """
    if dtype == torch.bfloat16:
        return CostModel(build_rows=1100.0, build_rows_per_rank=2.0, product_row=2.0)
    return CostModel(build_rows=150.0, build_rows_per_rank=3.0, merged=True)
