"""Weight mode: a run's own weight delta, made, used and forgotten.

    y = x Mᵀ,   M = W0 ∘ (shift + Σ_k a_k b_kᵀ)

Three products per run in training at any rank: y here, and dx = G M and Gᵀ x in the backward, which makes M again
rather than keep it. W0 is frozen and gets no gradient.

Shape legend: A runs of L tokens and K rows each, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from workers.row_form.base_linear import BaseLinear

SCRATCH_BYTES = 256 << 20
"""Upper limit of all M of one batched product; more runs go in several products."""
CPU_SCRATCH_BYTES = 8 << 20
"""The same on a CPU, where an M is best used while it is still in the cache (measured: 1.3 times as fast)."""


def weight_product(
    x_ALI: Tensor, base: BaseLinear, a_AKO: Tensor, b_AKI: Tensor, shift_A: Tensor
) -> Tensor:
    """y_ALO in the type of `x_ALI`. M is rounded on its own to that type, so small deltas survive 16 bits."""
    one = max(1, base.in_features * base.out_features * max(a_AKO.itemsize, x_ALI.itemsize))
    limit = CPU_SCRATCH_BYTES if x_ALI.device.type == "cpu" else SCRATCH_BYTES
    at_once = max(1, limit // one)
    chunks = [
        _apply(x_ALI[some], a_AKO[some], b_AKI[some], shift_A[some], base)
        for start in range(0, x_ALI.shape[0], at_once)
        for some in [slice(start, start + at_once)]
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def scratch_bound(
    projections: Mapping[str, tuple[int, int]], num_runs: int, dtype: torch.dtype
) -> int:
    """Bytes that a forward's weight mode holds at most: the M of one batched product, and one base weight unpacked."""
    largest = max((i * o for i, o in projections.values()), default=0) * dtype.itemsize
    return max(largest, min(SCRATCH_BYTES, num_runs * largest)) + largest


def _weights(
    dtype: torch.dtype, a_AKO: Tensor, b_AKI: Tensor, shift_A: Tensor, base: BaseLinear
) -> Tensor:
    """M, one matrix_OI per run. Wider rows are rounded first, as serving has them: half as many bytes move."""
    a_AKO, b_AKI = a_AKO.to(dtype), b_AKI.to(dtype)
    shift_A11 = shift_A.to(dtype)[:, None, None]
    return torch.baddbmm(shift_A11, a_AKO.transpose(1, 2), b_AKI).mul_(_base_weight(base))


def _base_weight(base: BaseLinear) -> Tensor:
    return base.dequantised_slice(slice(None), slice(None))


class _WeightProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ALI: Tensor, a_AKO: Tensor, b_AKI: Tensor, shift_A: Tensor, base: BaseLinear
    ) -> Tensor:
        ctx.save_for_backward(x_ALI, a_AKO, b_AKI, shift_A)
        ctx.base = base
        m_AOI = _weights(x_ALI.dtype, a_AKO, b_AKI, shift_A, base)
        return torch.bmm(x_ALI, m_AOI.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ALO: Tensor) -> tuple[Tensor | None, ...]:
        x_ALI, a_AKO, b_AKI, shift_A = ctx.saved_tensors
        weight_OI = _base_weight(ctx.base)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            m_AOI = _weights(x_ALI.dtype, a_AKO, b_AKI, shift_A, ctx.base)
            grad_x = torch.bmm(grad_ALO, m_AOI)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # Multiplied before it is widened: two types in one operation take much longer.
            pattern_AOI = torch.bmm(grad_ALO.transpose(1, 2), x_ALI).mul_(weight_OI)
            pattern_AOI = pattern_AOI.to(a_AKO.dtype)
            grad_a = torch.bmm(b_AKI, pattern_AOI.transpose(1, 2))
            grad_b = torch.bmm(a_AKO, pattern_AOI)
        return grad_x, grad_a, grad_b, None, None


_apply: Callable[..., Tensor] = _WeightProduct.apply
