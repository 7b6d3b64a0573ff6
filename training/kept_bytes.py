"""What a forward keeps for its backward, estimated without a model; `activation_memory` measures it on one.

A token keeps a few numbers for each input and output of a projection (also what lies between projections: norms,
rotation, gate), the outputs of rows in row mode, and add rows where they are gathered; a run that is not computed row
by row keeps a copy of its rows. The figures were counted from what autograd saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.activation_bytes import RunBytes, run_lengths
from training.row_room import RowLayouts
from workers.bank.layout import ModuleLayout
from workers.row_form.cost import CostModel, training_cost

_KEPT_WIDE = 0.7  # numbers in float32 or wider, for each input and output
_KEPT = 1.3  # in the base's type
_KEPT_OF_A_SCALE = (
    2.2  # of outputs that are scaled: the product before it, and its page for each token
)
_OF_A_ROW = 2  # tensors of the rows of one projection that exist at once, on each of its sides


def estimated_run(
    projections: Mapping[str, tuple[int, int]], layouts: RowLayouts, dtype: torch.dtype
) -> RunBytes:
    """Of a run of an adapter, in all layers."""
    return RunBytes(
        tuple(
            (length, round(_kept_bytes(projections, layouts, length, dtype)))
            for length in run_lengths(layouts, dtype)
        )
    )


def _kept_bytes(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    num_tokens: int,
    dtype: torch.dtype,
) -> float:
    cost = training_cost(dtype)
    narrow = dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    token = run = 0.0
    for path, (num_in, num_out) in projections.items():
        token += (_KEPT_WIDE * wide + _KEPT * narrow) * (num_in + num_out)
        layout = layouts.get(path)
        if layout is None:
            continue
        mul, add = _rows_by_token(cost, layout, num_tokens)
        token += narrow * mul * num_out
        if layout.num_add:
            token += (wide - narrow) * num_in + wide * layout.num_add  # in the rows' own type
        # A row, its product with the token's input, that input again; and the row of the output.
        token += wide * add * (3 * num_in + num_out)
        run += wide * (layout.num_mul - mul + layout.num_add - add) * (num_in + num_out)
        if layout.has_scale:
            token += wide * _KEPT_OF_A_SCALE * num_out
    return token * num_tokens + run


def row_bytes(
    projections: Mapping[str, tuple[int, int]],
    layouts: RowLayouts,
    num_tokens: int,
    dtype: torch.dtype,
) -> int:
    """What the largest product of rows, token by token, has in hand for a run."""
    cost = training_cost(dtype)
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return num_tokens * max(
        (
            wide
            * _OF_A_ROW
            * max(_rows_by_token(cost, layout, num_tokens))
            * sum(projections[path])
            for path, layout in layouts.items()
        ),
        default=0,
    )


def _rows_by_token(cost: CostModel, layout: ModuleLayout, num_tokens: int) -> tuple[int, int]:
    """The mul rows and add rows that each token of a run has of its own."""
    in_weights = cost.prefers_weight_mode(num_tokens, layout.num_mul, layout.offset)
    is_thin = cost.prefers_thin_product(num_tokens, layout.num_add)
    return 0 if in_weights else layout.num_mul, 0 if is_thin else layout.num_add
