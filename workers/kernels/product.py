"""One adapted linear layer on a GPU: the counterpart of `workers.row_form.adapted_product`, without a backward.

Launches per layer: a decode step with FLoRA two (stacked rows, outputs), with LoRA three (the library's own product,
dots, outputs), whatever the number of adapters and however their ranks mix.

Shape legend: T tokens in the step, I input features, O output features, N bank pages, Z splits of R rows, D splits of
P dots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.bank.module_bank import ModuleBank
from workers.kernels.add_rows import dot_add_rows, empty_dots
from workers.kernels.outputs import sum_rows
from workers.kernels.stacked_rows import stacked_rows
from workers.kernels.step_tables import LONG_TILE_TOKENS, WEIGHT_TILE_TOKENS, StepTables
from workers.kernels.tiles import dot_tiles, stacked_tiles, sum_tiles, weight_tiles
from workers.kernels.weight_mode import weight_mode
from workers.row_form.base_linear import BaseLinear


def adapted_product(
    x_TI: Tensor,
    base: BaseLinear,
    in_rows_NI: Tensor,
    out_rows_NO: Tensor,
    tables: StepTables,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The layer's output_TO, bias included, rounded once to `dtype`.

    Args:
        x_TI: of the base's and the bank's type, float32 or 16 bits.
    """
    x_TI = x_TI.contiguous()
    y_TO = torch.empty(x_TI.shape[0], base.out_features, dtype=dtype, device=x_TI.device)
    dots_DP = _dots(x_TI, in_rows_NI, tables)
    if len(tables.row_token_R) or len(tables.sum_short_JC) or len(tables.sum_long_JC):
        z_ZRO = _rows(x_TI, base, in_rows_NI, tables)
        _sum(y_TO, z_ZRO, dots_DP, out_rows_NO, base.bias_O, tables)
    if len(tables.weight_JC):
        weight_mode(
            y_TO,
            x_TI,
            in_rows_NI,
            out_rows_NO,
            base.dequantised_slice(slice(None), slice(None)),
            base.bias_O,
            dots_DP,
            tables.page_F,
            tables.weight_JC,
            tables.max_mul,
            weight_tiles(WEIGHT_TILE_TOKENS, base.in_features, base.out_features, x_TI.dtype),
        )
    return y_TO


def _sum(
    y_TO: Tensor,
    z_ZRO: Tensor,
    dots_DP: Tensor | None,
    out_rows_NO: Tensor,
    bias_O: Tensor | None,
    tables: StepTables,
) -> None:
    """The outputs of all tokens that are not in weight mode."""
    for tile_JC, tile_tokens in (
        (tables.sum_short_JC, 1),
        (tables.sum_long_JC, LONG_TILE_TOKENS),
    ):
        tiles = sum_tiles(tile_tokens, y_TO.shape[1])
        sum_rows(y_TO, z_ZRO, dots_DP, out_rows_NO, bias_O, tables.page_F, tile_JC, tiles)


def _rows(x_TI: Tensor, base: BaseLinear, in_rows_NI: Tensor, tables: StepTables) -> Tensor:
    """z_ZRO: every token's rows times W0. Without mul rows that is the base product alone."""
    if tables.stacks_rows:
        return stacked_rows(
            x_TI,
            in_rows_NI,
            base.dequantised_slice(slice(None), slice(None)),
            tables.row_token_R,
            tables.row_page_R,
            stacked_tiles(len(tables.row_token_R), base.in_features, base.out_features, x_TI.dtype),
        )
    x_RI = x_TI if tables.rows_are_tokens else x_TI.index_select(0, tables.row_token_R)
    return base.matmul(x_RI)[None]


def _dots(x_TI: Tensor, in_rows_NI: Tensor, tables: StepTables) -> Tensor | None:
    """dots_DP of all add rows, None where the step has none."""
    if not tables.num_dots:
        return None
    num_tiles = len(tables.dot_short_JC) + len(tables.dot_long_JC)
    short, long = (
        dot_tiles(num_tiles, tile_tokens, x_TI.shape[1]) for tile_tokens in (1, LONG_TILE_TOKENS)
    )
    dots_DP = empty_dots(tables.num_dots, short.splits, x_TI.device)
    dot_add_rows(dots_DP, x_TI, in_rows_NI, tables.page_F, tables.dot_short_JC, short)
    dot_add_rows(dots_DP, x_TI, in_rows_NI, tables.page_F, tables.dot_long_JC, long)
    return dots_DP


class KernelRows:
    """The kernels as a runner's arithmetic uses them: outputs in the model's type."""

    def product(
        self,
        x_TI: Tensor,
        base: BaseLinear,
        in_rows_NI: Tensor,
        out_rows_NO: Tensor,
        tables: StepTables,
    ) -> Tensor:
        return adapted_product(x_TI, base, in_rows_NI, out_rows_NO, tables, dtype=x_TI.dtype)

    def finish(
        self, x_TI: Tensor, z_TO: Tensor, base: BaseLinear, rows: ModuleBank, tables: StepTables
    ) -> None:
        """Scale, add rows and biases, in place on the base product of all tokens."""
        dots_DP = _dots(x_TI.contiguous(), rows.in_rows_NI, tables)
        _sum(z_TO, z_TO[None], dots_DP, rows.out_rows_NO, base.bias_O, tables)
