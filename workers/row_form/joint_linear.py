"""Projections of one input, run as one product where no adapter needs its rows between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.bank.module_bank import ModuleBank
from workers.row_form.adapted_linear import AdaptedLinear
from workers.row_form.base_linear import BaseLinear, DenseLinear


class Epilogue(Protocol):
    """Adds to a base product, in place, what adapters without rows in that product bring."""

    def finish(
        self, x_TI: Tensor, z_TO: Tensor, base: BaseLinear, rows: ModuleBank, index: Any
    ) -> None: ...


class JointLinear:
    """q, k and v, or gate and up. mul rows have their own b per projection, so a step with such runs them apart.

    Args:
        layers: share their input; their dense weights become views of one matrix, so those are not held twice. Packed
            weights are: once for each layer, once for all.
        epilogue: None: a step with any adapter runs them apart.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLinear],
        make_linear: Callable[[Tensor, Tensor | None], BaseLinear],
        epilogue: Epilogue | None,
    ) -> None:
        self._layers = tuple(layers)
        self._epilogue = epilogue
        self._sizes = [layer.base.out_features for layer in layers]
        weight_OI = torch.cat([layer.weight for layer in layers])
        biases = [layer.base.bias_O for layer in layers]
        self._has_bias = any(bias is not None for bias in biases)
        for layer, part_OI in zip(layers, torch.split(weight_OI, self._sizes), strict=True):
            if isinstance(layer.base, DenseLinear):
                layer.base.weight_OI = part_OI
        self._joint = make_linear(
            weight_OI,
            torch.cat(
                [
                    weight_OI.new_zeros(size) if bias is None else bias
                    for bias, size in zip(biases, self._sizes, strict=True)
                ]
            )
            if self._has_bias
            else None,
        )

    def __call__(self, x_TI: Tensor) -> tuple[Tensor, ...]:
        """One output per layer, bias included; views of one matrix where they ran as one."""
        indices = [layer.index for layer in self._layers]
        if all(index is None for index in indices):
            z = self._joint.matmul(x_TI)
            if self._joint.bias_O is not None:
                z += self._joint.bias_O
            return torch.split_with_sizes(z, self._sizes, dim=1)
        if self._epilogue is None or any(
            index is not None and index.has_mul_rows for index in indices
        ):
            return tuple(layer(x_TI) for layer in self._layers)
        parts = torch.split_with_sizes(self._joint.matmul(x_TI), self._sizes, dim=1)
        for layer, index, z_TO in zip(self._layers, indices, parts, strict=True):
            if index is not None and layer.rows is not None:
                self._epilogue.finish(x_TI, z_TO, layer.base, layer.rows, index)
            elif layer.base.bias_O is not None:
                z_TO += layer.base.bias_O
        return parts
