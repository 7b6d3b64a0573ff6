"""A bank's rows as one trainable tensor for each width, so that an optimizer's step is a few operations.

Shape legend: K rows of one width W, N bank pages, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.optimizer import RowBlock
from workers.bank.bank import AdapterBank
from workers.bank.module_bank import ModuleBank


def make_trainable(
    bank: AdapterBank, apart: Mapping[int, int], *, nobody: int
) -> tuple[dict[int, RowBlock], dict[tuple[str, str], tuple[int, int]]]:
    """Put leaves that share one storage per width in the bank's place; rows `apart` of zeros lie behind them.

    Args:
        apart: rows by width that no layer reads.
        nobody: owner of rows that belong to no adapter, as all do at first.

    Returns:
        The blocks by width, and for each (projection, side) its width and the first of its rows in the block.
    """
    sides = [
        (path, side, tensor)
        for path, module in bank.modules.items()
        for side, tensor in (("in", module.in_rows_NI), ("out", module.out_rows_NO))
    ]
    by_width: dict[int, list[Tensor]] = {}
    places: dict[tuple[str, str], tuple[int, int]] = {}
    for path, side, tensor in sides:
        num_pages, width = tensor.shape
        members = by_width.setdefault(width, [])
        places[path, side] = (width, len(members) * num_pages)
        members.append(tensor)
    blocks = {}
    for width, members in by_width.items():
        behind = members[0].new_zeros(apart.get(width, 0), width)
        weight_KW = torch.cat([*members, behind])
        owner_K = torch.full((weight_KW.shape[0],), nobody, device=bank.device)
        blocks[width] = RowBlock(weight_KW, owner_K)
    for path, module in bank.modules.items():
        bank.modules[path] = ModuleBank(
            in_rows_NI=_leaf(blocks, places[path, "in"], module.in_rows_NI.shape[0]),
            out_rows_NO=_leaf(blocks, places[path, "out"], module.out_rows_NO.shape[0]),
            bias_O=module.bias_O,
        )
    return blocks, places


def _leaf(blocks: Mapping[int, RowBlock], place: tuple[int, int], num_pages: int) -> Tensor:
    """Rows of a block as a parameter whose gradient is added up in the block's own gradient."""
    width, first = place
    block = blocks[width]
    leaf = block.weight_KW[first : first + num_pages].detach().requires_grad_(True)
    leaf.grad = block.gradient_KW[first : first + num_pages]
    return leaf
