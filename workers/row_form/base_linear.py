"""The frozen layer under an adapter, behind the only three things an adapted layer may ask of it.

Packed, quantised and tensor-parallel bases implement the same protocol. Shape legend: T tokens, I input features,
O output features.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional


@runtime_checkable
class BaseLinear(Protocol):
    """`y_TO = x_TI @ W0_OI.T + bias_O`, with W0 frozen. Methods never mutate and are safe inside autograd."""

    in_features: int
    out_features: int
    bias_O: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The type `matmul` takes and returns."""

    def matmul(self, x_TI: Tensor) -> Tensor:
        """`x_TI @ W0_OI.T` without the bias."""

    def dequantised_slice(self, rows: slice, columns: slice) -> Tensor:
        """W0_OI[rows, columns] as a dense tensor of `dtype`; may be a view: do not write to it."""


class DenseLinear:
    """A `BaseLinear` over an ordinary weight tensor, which it shares with the model and never copies."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O
        self.out_features, self.in_features = weight_OI.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_OI.dtype

    def matmul(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self.weight_OI)

    def dequantised_slice(self, rows: slice, columns: slice) -> Tensor:
        return self.weight_OI[rows, columns]
