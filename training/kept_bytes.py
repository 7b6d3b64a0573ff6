"""What a forward keeps for its backward, in bytes. The figures were counted from tensors that autograd had saved.

With W the inputs and outputs of all projections together, a token keeps a few numbers for each of them (inputs and
outputs of projections, what lies between: norms, rotation, gate), and in row mode both sides of every mul row besides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.row_room import RowLayouts
from workers.row_form.cost import training_cost

_KEPT = 3.4  # numbers of a projection's inputs and outputs
_KEPT_OF_A_ROW = 2.3  # of a mul row in row mode
_KEPT_OF_A_SCALE = (
    1.6  # of outputs that are scaled: the product before it, and its page for each token
)


def kept_bytes_per_token(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    *,
    run_tokens: int,
    num_layers: int,
    hidden: int,
    dtype: torch.dtype,
    checkpoint: bool,
) -> float:
    """For one token of an adapter that has `run_tokens` tokens one after another in the step.

    Args:
        checkpoint: a layer keeps its inputs only, and makes the rest again in the backward, one layer at a time.
    """
    cost = training_cost(dtype)
    numbers = 0.0
    for path, (num_in, num_out) in projections.items():
        numbers += _KEPT * (num_in + num_out)
        layout = layouts.get(path)
        if layout is None:
            continue
        if not cost.prefers_weight_mode(run_tokens, layout.num_mul, layout.offset):
            numbers += _KEPT_OF_A_ROW * layout.num_mul * (num_in + num_out)
        if layout.has_scale:
            numbers += _KEPT_OF_A_SCALE * num_out
    if checkpoint:
        numbers = numbers / num_layers + hidden * num_layers
    # Sums are kept in float32 at least, and so are what they are made of.
    return numbers * torch.promote_types(dtype, torch.float32).itemsize
