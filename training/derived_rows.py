"""Rows the layers read that are not trained themselves: DoRA's scaled rows and scales, IA3's biases.

The row form knows no magnitudes, and no vector that enters twice. So what is trained lies in rows of its own; what the
layers read is worked out from it before every forward, and gradients go back the same way. All adapters of a
projection at once, and never one adapter's numbers with another's.

    DoRA   c = m / n, n = ‖W0 + g Σ q pᵀ‖    layers read c − 1 and q' = c ∘ q    dq = c ∘ dq', dm = (dc + Σ q ∘ dq') / n
    IA3    bias' = l ∘ bias                  layers read l − 1 and bias' − bias  dl = dc + bias ∘ dbias'

The norm counts as a constant in the gradient, as in PEFT. Source: DoRA, arXiv 2402.09353, section 4.3.

Shape legend: D adapters with a magnitude in one projection, K their rows, padded with rows of zeros, I input features,
O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.optimizer import RowBlock
from workers.row_form.base_linear import BaseLinear


class DerivedRows(Protocol):
    """Some of them, of one projection. Called without autograd."""

    def refresh(self) -> None:
        """Write what layers read."""

    def pull_gradients(self) -> None:
        """Add to the gradients of what is trained what the layers left on what they read since `refresh`."""


@dataclass(frozen=True, slots=True)
class MagnitudePlaces:
    """One adapter's DoRA in one projection, as rows of the blocks of its input and output widths.

    `magnitude` is trained as the difference from the base's own, which is what 32 bits and weight decay are for.
    """

    p: tuple[int, ...]
    q: tuple[int, ...]  # trained
    read_q: tuple[int, ...]
    magnitude: int  # trained
    read_scale: int
    gate: float


class ProjectionMagnitudes:
    """DoRA of all adapters that have it in one projection: nobody until `hold`.

    Args:
        zeros: rows of the two blocks that are zeros for good.
    """

    def __init__(
        self, base: BaseLinear, ins: RowBlock, outs: RowBlock, zeros: tuple[int, int]
    ) -> None:
        self._base, self._ins, self._outs, self._zeros = base, ins, outs, zeros
        weight_OI = base.dequantised_slice(slice(None), slice(None)).to(outs.weight_KW.dtype)
        self._square_O = weight_OI.square().sum(1)
        self.length_O = self._square_O.sqrt()
        self.hold(())

    def hold(self, places: Sequence[MagnitudePlaces]) -> None:
        """Work for these adapters from now on."""
        device, dtype = self._outs.weight_KW.device, self._outs.weight_KW.dtype
        most = max((len(place.q) for place in places), default=0)

        def padded(rows: Sequence[tuple[int, ...]], zero: int) -> Tensor:
            table = [[*row, *(zero,) * (most - len(row))] for row in rows]
            return torch.tensor(table, dtype=torch.int64, device=device).view(len(rows), most)

        def vector(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._is_idle = not places
        self._p_DK = padded([place.p for place in places], self._zeros[0])
        self._q_DK = padded([place.q for place in places], self._zeros[1])
        read_DK = padded([place.read_q for place in places], -1)
        self._is_row_DK = read_DK >= 0
        self._read_q = read_DK[self._is_row_DK]
        self._magnitude_D = vector([place.magnitude for place in places])
        self._read_scale_D = vector([place.read_scale for place in places])
        gates = [place.gate for place in places]
        self._gate_D11 = torch.tensor(gates, dtype=dtype, device=device)[:, None, None]
        self._scale_D1O = self._norm_DO = torch.empty(0)  # of the last refresh

    def refresh(self) -> None:
        if self._is_idle:
            return
        q_DKO = self._outs.weight_KW[self._q_DK]
        self._norm_DO = self._norms(q_DKO)
        magnitude_DO = self.length_O + self._outs.weight_KW[self._magnitude_D]
        self._scale_D1O = (magnitude_DO / self._norm_DO)[:, None]
        self._outs.weight_KW[self._read_q] = (q_DKO * self._scale_D1O)[self._is_row_DK]
        self._outs.weight_KW[self._read_scale_D] = self._scale_D1O[:, 0] - 1

    def pull_gradients(self) -> None:
        if self._is_idle:
            return
        gradient_KW = self._outs.gradient_KW
        of_read_DKO = gradient_KW.new_zeros(*self._is_row_DK.shape, gradient_KW.shape[1])
        of_read_DKO[self._is_row_DK] = gradient_KW[self._read_q]
        q_DKO = self._outs.weight_KW[self._q_DK]
        of_scale_DO = gradient_KW[self._read_scale_D] + (of_read_DKO * q_DKO).sum(1)
        gradient_KW[self._q_DK[self._is_row_DK]] += (of_read_DKO * self._scale_D1O)[self._is_row_DK]
        gradient_KW[self._magnitude_D] += of_scale_DO / self._norm_DO

    def _norms(self, q_DKO: Tensor) -> Tensor:
        """‖W0 + g Σ q pᵀ‖_DO, row by row, without such a weight: ‖W0‖² + 2 Σ q ∘ (W0 p) + Σ q ∘ ((p·p') q')."""
        p_DKI = self._ins.weight_KW[self._p_DK]
        product_KO = self._base.matmul(p_DKI.flatten(0, 1).to(self._base.dtype)).to(q_DKO.dtype)
        scaled_DKO = self._gate_D11 * q_DKO
        twice_DKO = 2 * product_KO.view_as(q_DKO)
        other_DKO = torch.bmm(torch.bmm(p_DKI, p_DKI.transpose(1, 2)), scaled_DKO)
        square_DO = self._square_O + (scaled_DKO * (twice_DKO + other_DKO)).sum(1)
        return square_DO.clamp_(min=torch.finfo(square_DO.dtype).tiny).sqrt()


class ScaledBiases:
    """The base bias of one projection under the scales of all adapters that scale it."""

    def __init__(self, bias_O: Tensor, outs: RowBlock, places: Sequence[tuple[int, ...]]) -> None:
        """`places`: the rows of each adapter's scale, which is trained, and of its bias."""
        self._outs = outs
        self._bias_O = bias_O.to(outs.weight_KW.dtype)
        scale_D, bias_D = zip(*places, strict=True)
        self._scale_D = torch.tensor(scale_D, device=bias_O.device)
        self._bias_D = torch.tensor(bias_D, device=bias_O.device)

    def refresh(self) -> None:
        weight_KW = self._outs.weight_KW
        weight_KW[self._bias_D] = weight_KW[self._scale_D] * self._bias_O

    def pull_gradients(self) -> None:
        gradient_KW = self._outs.gradient_KW
        gradient_KW[self._scale_D] += gradient_KW[self._bias_D] * self._bias_O
