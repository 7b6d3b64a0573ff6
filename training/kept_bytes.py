"""What a forward keeps for its backward, estimated without a model; `activation_memory` measures it on one.

A token keeps a few numbers for each input and output of a projection (also what lies between projections: norms,
rotation, gate), and the outputs of rows in row mode. The figures were counted from what autograd saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.row_room import RowLayouts
from workers.row_form.cost import training_cost

_KEPT_WIDE = 0.7  # numbers in float32 or wider, for each input and output
_KEPT = 1.3  # in the base's type
_KEPT_OF_A_SCALE = (
    2.2  # of outputs that are scaled: the product before it, and its page for each token
)
_OF_A_ROW = 2  # tensors of the rows of one projection that exist at once, on each of its sides


def kept_bytes_per_token(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    run_tokens: int,
    dtype: torch.dtype,
) -> int:
    """In all layers, for one token of an adapter that has `run_tokens` tokens one after another in a step."""
    cost = training_cost(dtype)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    kept = 0.0
    for path, (num_in, num_out) in projections.items():
        kept += (_KEPT_WIDE * wide + _KEPT * dtype.itemsize) * (num_in + num_out)
        layout = layouts.get(path)
        if layout is None:
            continue
        if not cost.prefers_weight_mode(run_tokens, layout.num_mul, layout.offset):
            kept += dtype.itemsize * layout.num_mul * num_out
        if layout.num_add:
            kept += (wide - dtype.itemsize) * num_in  # in the rows' own type
        if layout.has_scale:
            kept += wide * _KEPT_OF_A_SCALE * num_out
    return round(kept)


def row_bytes_per_token(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    run_tokens: int,
    dtype: torch.dtype,
) -> int:
    """What the largest product of row mode has in hand for one token, of `run_tokens` that stand together."""
    cost = training_cost(dtype)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return max(
        (
            wide * _OF_A_ROW * layout.num_mul * sum(projections[path])
            for path, layout in layouts.items()
            if not cost.prefers_weight_mode(run_tokens, layout.num_mul, layout.offset)
        ),
        default=0,
    )
