"""What a forward keeps for its backward, estimated without a model; `activation_memory` measures it on one.

A token keeps a few numbers for each input and output of a projection (also what lies between projections: norms,
rotation, gate), in row mode both sides of every mul row besides, and for add rows its input in their own type. The figures were counted from what autograd saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.row_room import RowLayouts
from workers.row_form.cost import training_cost

_KEPT_WIDE = 0.7  # numbers in float32 or wider, for each input and output
_KEPT = 1.3  # in the base's type
_KEPT_OF_A_ROW = 2.3  # of a mul row in row mode, in float32 or wider
_KEPT_OF_A_SCALE = (
    2.2  # of outputs that are scaled: the product before it, and its page for each token
)


def kept_bytes_per_token(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    run_tokens: int,
    dtype: torch.dtype,
) -> int:
    """In all layers, for one token of an adapter that has `run_tokens` tokens one after another in a step."""
    cost = training_cost(dtype)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    usual = _KEPT_WIDE * wide + _KEPT * dtype.itemsize
    kept = 0.0
    for path, (num_in, num_out) in projections.items():
        kept += usual * (num_in + num_out)
        layout = layouts.get(path)
        if layout is None:
            continue
        if not cost.prefers_weight_mode(run_tokens, layout.num_mul, layout.offset):
            kept += wide * _KEPT_OF_A_ROW * layout.num_mul * (num_in + num_out)
        if layout.num_add:
            kept += (wide - dtype.itemsize) * num_in
        if layout.has_scale:
            kept += wide * _KEPT_OF_A_SCALE * num_out
    return round(kept)
