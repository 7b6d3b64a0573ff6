"""All values of an adapter looked at in few calls: it has hundreds of small tensors, and calls are what takes time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_TOGETHER = 64
"""Tensors that are copied into one: all at once would copy a large adapter whole."""


def largest_value(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value in floats of any types on any devices: NaN if there is one, 0 if there are none."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        of_device.setdefault(tensor.device, []).append(tensor.flatten())
    extremes = [torch.zeros(1, dtype=torch.float64)]
    for flat in of_device.values():
        for first in range(0, len(flat), _TOGETHER):
            values = torch.cat(flat[first : first + _TOGETHER])
            if values.numel():
                # NaN is handed on by both.
                extremes.append(torch.stack(torch.aminmax(values)).cpu().double())
    return float(torch.cat(extremes).abs().max())
