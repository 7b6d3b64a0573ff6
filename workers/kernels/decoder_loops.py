"""The steps between a decoder's matrix products on a GPU, one launch each: see `workers.models.native.decoder_loops`.

All are bound by launches in a decode step and by memory in a prefill: every value is read once and written once, in the
model's type, and rounded where the torch version rounds.

Shape legend: T tokens, H hidden features, F features of the feed-forward part, X features of all heads of a token,
D half a head's dimension, M positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(
    y, residual, x, weight, epsilon, residual_stride, x_stride, hidden, HAS_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    in_H = h < hidden
    wide = tl.load(residual + token * residual_stride + h, mask=in_H, other=0.0)
    if HAS_X:
        added = tl.load(x + token * x_stride + h, mask=in_H, other=0.0)
        wide = (wide.to(tl.float32) + added.to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + token * residual_stride + h, wide, mask=in_H)
    wide = wide.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + epsilon)
    normed = (wide * scale).to(y.dtype.element_ty).to(tl.float32)
    weight_H = tl.load(weight + h, mask=in_H, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + h, (weight_H * normed).to(y.dtype.element_ty), mask=in_H)


@triton.jit
def _silu_mul(y, gate, up, gate_stride, up_stride, num_features, BLOCK_F: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_F = f < num_features
    g = tl.load(gate + token * gate_stride + f, mask=in_F, other=0.0).to(tl.float32)
    u = tl.load(up + token * up_stride + f, mask=in_F, other=0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + token * num_features + f, (activated * u).to(y.dtype.element_ty), mask=in_F)


@triton.jit
def _rotate(x, cosine, sine, position_T, x_stride, half, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_D = d < half
    real_at = x + token * x_stride + tl.program_id(1) * 2 * half + d
    position = tl.load(position_T + token).to(tl.int64)
    c = tl.load(cosine + position * half + d, mask=in_D, other=0.0).to(tl.float32)
    s = tl.load(sine + position * half + d, mask=in_D, other=0.0).to(tl.float32)
    real = tl.load(real_at, mask=in_D, other=0.0).to(tl.float32)
    imaginary = tl.load(real_at + half, mask=in_D, other=0.0).to(tl.float32)
    element = x.dtype.element_ty
    tl.store(real_at, (real * c - imaginary * s).to(element), mask=in_D)
    tl.store(real_at + half, (imaginary * c + real * s).to(element), mask=in_D)


class KernelDecoderLoops:
    """A `DecoderLoops`. Matrices may be columns of a wider one; their last dimension is contiguous."""

    def add_rms_norm(
        self, residual_TH: Tensor, x_TH: Tensor | None, weight_H: Tensor, epsilon: float
    ) -> Tensor:
        num_tokens, hidden = residual_TH.shape
        y_TH = torch.empty(num_tokens, hidden, dtype=residual_TH.dtype, device=residual_TH.device)
        if num_tokens:
            added = residual_TH if x_TH is None else x_TH
            _add_rms_norm[(num_tokens,)](
                y_TH, residual_TH, added, weight_H, epsilon, residual_TH.stride(0),
                added.stride(0), hidden, HAS_X=x_TH is not None,
                BLOCK_H=triton.next_power_of_2(hidden),
            )  # fmt: skip
        return y_TH

    def silu_mul(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        num_tokens, num_features = gate_TF.shape
        y_TF = torch.empty(num_tokens, num_features, dtype=gate_TF.dtype, device=gate_TF.device)
        block = min(1024, triton.next_power_of_2(num_features))
        if num_tokens:
            _silu_mul[(num_tokens, triton.cdiv(num_features, block))](
                y_TF, gate_TF, up_TF, gate_TF.stride(0), up_TF.stride(0), num_features,
                BLOCK_F=block,
            )  # fmt: skip
        return y_TF

    def rotate(self, x_TX: Tensor, cosine_MD: Tensor, sine_MD: Tensor, position_T: Tensor) -> None:
        half = cosine_MD.shape[1]
        num_tokens, num_heads = x_TX.shape[0], x_TX.shape[1] // (2 * half)
        if num_tokens:
            _rotate[(num_tokens, num_heads)](
                x_TX, cosine_MD, sine_MD, position_T, x_TX.stride(0), half,
                BLOCK_D=triton.next_power_of_2(half), num_warps=1,
            )  # fmt: skip
