"""What row mode and weight mode really cost on this device, measured when an engine starts; some tens of milliseconds.

Shape legend: T tokens, I input features, O output features, R rank rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from workers.row_form.base_linear import BaseLinear
from workers.row_form.cost import THIN_PRODUCT_TOKENS, CostModel
from workers.row_form.weight_product import weight_product

_FEW, _MANY, _RANK = 64, 256, 16
_ROUNDS = 5


def measure_cost(base: BaseLinear, *, thin_products: bool) -> CostModel:
    """The cost model of one layer of the model, the largest for choice: there the choice matters most.

    Args:
        thin_products: false where the product takes add rows token by token only, as compiled loops do.
    """
    device = base.dequantised_slice(slice(0, 1), slice(0, 1)).device

    def rows(count: int, features: int) -> torch.Tensor:
        return torch.ones(count, features, dtype=base.dtype, device=device)

    def row_mode(num_tokens: int) -> float:
        x_TI = rows(num_tokens, base.in_features)
        return _seconds(lambda: base.matmul(x_TI), device)

    def weight_mode(num_tokens: int, rank: int) -> float:
        x_1TI = rows(num_tokens, base.in_features)[None]
        a_1RO, b_1RI = rows(rank, base.out_features)[None], rows(rank, base.in_features)[None]
        shift_1 = torch.zeros(1, device=device)
        return _seconds(lambda: weight_product(x_1TI, base, a_1RO, b_1RI, shift_1), device)

    with torch.inference_mode():
        many_s = row_mode(_MANY)
        # On a busy machine two times may differ by nothing but noise; a row costs a good part of the mean at least.
        row_s = max((many_s - row_mode(_FEW)) / (_MANY - _FEW), many_s / _MANY / 4)
        few_s = weight_mode(_FEW, 1)
        product_row = max((weight_mode(_MANY, 1) - few_s) / (_MANY - _FEW) / row_s, 0.5)
        per_rank = max((weight_mode(_FEW, _RANK) - few_s) / (_RANK - 1) / row_s, 0.0)
    return CostModel(
        build_rows=max(0.0, few_s / row_s - _FEW * product_row - per_rank),
        build_rows_per_rank=per_rank,
        product_row=product_row,
        thin_product_tokens=THIN_PRODUCT_TOKENS if thin_products else sys.maxsize,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs: what disturbs a run only ever makes it longer."""
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait_for(device)
        began_s = time.perf_counter()
        work()
        _wait_for(device)
        best = min(best, time.perf_counter() - began_s)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
