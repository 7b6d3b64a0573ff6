"""AdamW over the rows of many adapters at once, each adapter with settings, step count and clip of its own.

All rows of one width lie in one tensor, whatever module, side or adapter they belong to, so a step is a few operations
however many adapters train. Nothing is ever summed across adapters.

Source: Loshchilov and Hutter, arXiv 1711.05101; clipping as `torch.nn.utils.clip_grad_norm_`.

Shape legend: K rows of one width W, S adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(eq=False)
class RowBlock:
    """Rows of one width with gradient and moments. `owner_K` is an adapter's number, or `num_adapters`: nobody's."""

    weight_KW: Tensor
    owner_K: Tensor  # int64
    gradient_KW: Tensor = field(init=False)
    mean_KW: Tensor = field(init=False)
    square_KW: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gradient_KW = torch.zeros_like(self.weight_KW)
        self.mean_KW = torch.zeros_like(self.weight_KW)
        self.square_KW = torch.zeros_like(self.weight_KW)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of these rows; the tensors themselves."""
        return {"weight": self.weight_KW, "mean": self.mean_KW, "square": self.square_KW}


@dataclass(frozen=True, slots=True)
class StepSettings:
    """One step's settings by adapter, in float64. `count_S` is the number of the update, from 1."""

    learning_rate_S: Tensor
    weight_decay_S: Tensor
    clip_norm_S: Tensor  # infinite where gradients are not clipped
    count_S: Tensor
    active_S: Tensor  # bool; rows of the others keep still


class RowAdamW:
    """Updates blocks in place; the trainer owns them."""

    def __init__(self, blocks: Sequence[RowBlock], num_adapters: int) -> None:
        self._blocks = blocks
        self._num_adapters = num_adapters

    def zero_gradients(self) -> None:
        for block in self._blocks:
            block.gradient_KW.zero_()

    def gradient_norms(self) -> Tensor:
        """norm_S of each adapter's gradient; not finite where any part of it is not."""
        dtype = self._blocks[0].weight_KW.dtype
        square_S = torch.zeros(
            self._num_adapters + 1, dtype=dtype, device=self._blocks[0].weight_KW.device
        )
        for block in self._blocks:
            square_S.index_add_(0, block.owner_K, block.gradient_KW.square().sum(1))
        return square_S[:-1].sqrt()

    @torch.no_grad()
    def step(self, norm_S: Tensor, settings: StepSettings) -> None:
        """One update of the active adapters from the gradients that are there.

        Rows of the others are deselected, not scaled by zero: 0 × inf is NaN.
        """
        clip_S = (settings.clip_norm_S / (norm_S.double() + 1e-6)).clamp(max=1.0)
        rate_S = settings.learning_rate_S / (1 - BETA1**settings.count_S)
        root_S = (1 - BETA2**settings.count_S).sqrt()
        keep_S = 1 - settings.learning_rate_S * settings.weight_decay_S
        for block in self._blocks:
            active_K1 = _by_row(settings.active_S, block, torch.bool)
            gradient_KW = block.gradient_KW.mul_(_by_row(clip_S, block))
            gradient_KW.masked_fill_(~active_K1, 0.0)
            mean_KW = block.mean_KW.lerp(gradient_KW, 1 - BETA1)
            square_KW = (block.square_KW * BETA2).addcmul_(
                gradient_KW, gradient_KW, value=1 - BETA2
            )
            scale_KW = square_KW.sqrt().div_(_by_row(root_S, block)).add_(EPSILON)
            weight_KW = block.weight_KW * _by_row(keep_S, block)
            weight_KW.sub_(mean_KW.div(scale_KW).mul_(_by_row(rate_S, block)))
            for old, new in (
                (block.weight_KW, weight_KW),
                (block.mean_KW, mean_KW),
                (block.square_KW, square_KW),
            ):
                old.copy_(torch.where(active_K1, new, old))


def _by_row(value_S: Tensor, block: RowBlock, dtype: torch.dtype | None = None) -> Tensor:
    """value_K1 in the rows' type; nobody's rows take False or 0."""
    padded = torch.cat([value_S, value_S.new_zeros(1)])
    return padded.index_select(0, block.owner_K)[:, None].to(dtype or block.weight_KW.dtype)
