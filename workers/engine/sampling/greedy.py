"""The greatest logit of every row, and whether the row can be trusted.

Shape legend: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.compiled.library import compiled_loops, is_compiled_type

Greatest = Callable[[Tensor], Tensor]
"""logits_LV → each row's first greatest place; -1 for a row with a value that is not finite."""


def torch_greatest(logits_LV: Tensor) -> Tensor:
    """In two passes, on any device."""
    lowest_L, highest_L = logits_LV.aminmax(dim=1)
    is_finite_L = torch.isfinite(lowest_L) & torch.isfinite(highest_L)
    return torch.where(is_finite_L, logits_LV.argmax(dim=1), -1)


def choose_greatest(device: torch.device, *, compiled: bool) -> Greatest:
    """The fastest there is: compiled on CPU, where torch's two passes take as long as five layers of a small model."""
    loops = compiled_loops() if compiled and device.type == "cpu" else None
    if loops is None:
        return torch_greatest

    def greatest(logits_LV: Tensor) -> Tensor:
        if not is_compiled_type(logits_LV.dtype) or not logits_LV.is_contiguous():
            return torch_greatest(logits_LV)
        place_L = torch.empty(logits_LV.shape[0], dtype=torch.int64)
        one_pass = loops.function("greatest", logits_LV.dtype)
        one_pass(logits_LV.data_ptr(), *logits_LV.shape, place_L.data_ptr())
        return place_L

    return greatest
