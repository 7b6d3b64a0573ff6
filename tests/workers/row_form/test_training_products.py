"""How many products with W0, or of its size, a training step of one layer takes: counted, not timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.workers.row_form.mixed_layers import MERGED_MODE, ROW_MODE, WEIGHT_MODE, mixed_layers
from workers.row_form.adapted_product import TrainedProduct
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group
from workers.row_form.trained_rows import TorchTrainedLoops

TOKENS, IN, OUT = 24, 40, 56


def multiplications(rank: int, cost: CostModel) -> int:
    """Of a forward and a backward through a layer with one FLoRA adapter of offset 1, in matrix products."""
    mixed = mixed_layers(
        seed=0,
        shapes={"only": (IN, OUT)},
        adapters=[{"only": ("flora", rank)}],
        segments=[(TOKENS, 0)],
        dtype=torch.float32,
    )
    module = mixed.bank.modules["only"]
    index = index_module_group(mixed.plan, mixed.bank.snapshot.table_of["only"], cost)
    base = DenseLinear(mixed.layers["only"].weight_OI)
    leaves: list[Tensor] = [
        tensor.detach().clone().requires_grad_()
        for tensor in (mixed.x["only"], module.in_rows_NI, module.out_rows_NO)
    ]
    with FlopCounterMode(display=False) as counter:
        y_TO = TrainedProduct(TorchTrainedLoops())(leaves[0], base, leaves[1], leaves[2], index)
        y_TO.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_row_mode_takes_two_products_and_none_for_the_gradient_of_w0(rank: int) -> None:
    assert multiplications(rank, ROW_MODE) == 2 * (TOKENS * (1 + rank)) * IN * OUT


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_weight_mode_takes_three_products_over_the_tokens_at_any_rank(rank: int) -> None:
    """Beside them the weight is made twice, and its gradient brought to both rows: `rank` rows each."""
    assert multiplications(rank, MERGED_MODE) == (3 * TOKENS + 4 * rank) * IN * OUT


@pytest.mark.parametrize("rank", [1, 64])
def test_where_the_base_product_stays_apart_it_is_two_more(rank: int) -> None:
    """As over a bfloat16 base, in whose values a small change would be lost."""
    assert multiplications(rank, WEIGHT_MODE) == (5 * TOKENS + 4 * rank) * IN * OUT
