"""The steps between a decoder's matrix products: what is asked of them, and how torch does them on any device.

Shape legend: T tokens, H hidden features, F features of the feed-forward part, X features of all heads of a token,
D head dimension, M positions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class DecoderLoops(Protocol):
    """Rounds where transformers' Llama rounds, or less often, so that both runners answer alike.

    Last dimensions are contiguous, tokens of a residual too.
    """

    def add_rms_norm(
        self, residual_TH: Tensor, x_TH: Tensor | None, weight_H: Tensor, epsilon: float
    ) -> Tensor:
        """Add `x` to the residual in place, and return the new residual normed and weighted."""

    def silu_mul(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """silu(gate) ∘ up. Both have the same strides."""

    def rotate(self, x_TX: Tensor, cosine_MD: Tensor, sine_MD: Tensor, position_T: Tensor) -> None:
        """Turn heads by their token's position, in place. Tables hold half a head: D is half the head dimension."""


class TorchDecoderLoops:
    """The reference, and what runs without a compiler."""

    def add_rms_norm(
        self, residual_TH: Tensor, x_TH: Tensor | None, weight_H: Tensor, epsilon: float
    ) -> Tensor:
        if x_TH is not None:
            residual_TH += x_TH
        # float32 whatever the model's type, as in transformers.
        wide_TH = residual_TH.to(torch.float32)
        scale_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + epsilon)
        return weight_H * (wide_TH * scale_T1).to(residual_TH.dtype)

    def silu_mul(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return functional.silu(gate_TF) * up_TF

    def rotate(self, x_TX: Tensor, cosine_MD: Tensor, sine_MD: Tensor, position_T: Tensor) -> None:
        cosine_T1D = cosine_MD[position_T][:, None]
        sine_T1D = sine_MD[position_T][:, None]
        heads = x_TX.view(x_TX.shape[0], -1, 2 * cosine_MD.shape[1])
        real, imaginary = heads.chunk(2, dim=-1)
        turned = real * cosine_T1D - imaginary * sine_T1D
        imaginary.copy_(imaginary * cosine_T1D + real * sine_T1D)
        real.copy_(turned)
