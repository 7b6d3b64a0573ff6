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


class PackedLinear(DenseLinear):
    """A dense layer with a second copy of its weight in the order in which the CPU's matrix unit reads it.

    Measured on one core with AMX, bfloat16: 1.6–2 times as fast as `DenseLinear` up to 64 rows. Without gradients.
    """

    # Rows the order is chosen for; measured as good as any other from 1 to 512 rows.
    _TYPICAL_ROWS = 32

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__(weight_OI, bias_O)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weight_OI.detach().contiguous(), self._TYPICAL_ROWS
        )

    @staticmethod
    def is_supported(weight_OI: Tensor) -> bool:
        """Float32 has no matrix unit, and gains nothing."""
        return (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype == torch.bfloat16
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def matmul(self, x_TI: Tensor) -> Tensor:
        if x_TI.dim() != 2:
            y = self.matmul(x_TI.reshape(-1, self.in_features))
            return y.view(*x_TI.shape[:-1], self.out_features)
        num_rows = x_TI.shape[0]
        padded = padded_rows(num_rows)
        if padded == num_rows:
            return self._product(x_TI)
        # What stands in the rows behind does not matter: rows never meet.
        rows = x_TI.new_empty(padded, self.in_features)
        rows[:num_rows] = x_TI
        return self._product(rows)[:num_rows]

    def _product(self, x_TI: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x_TI, self._packed, None, "none", [], ""
        )
        return y


def padded_rows(count: int) -> int:
    """The next number of rows that packed products are computed with.

    The matrix library compiles a kernel for every new number of rows and keeps it: measured 0.9 ms and 0.7 MB each.
    """
    step = 16 if count <= 256 else 32 if count <= 1024 else 128
    return -(-count // step) * step


def serving_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> BaseLinear:
    """The fastest base layer for inference on the weight's device."""
    kind = PackedLinear if PackedLinear.is_supported(weight_OI) else DenseLinear
    return kind(weight_OI, bias_O)
