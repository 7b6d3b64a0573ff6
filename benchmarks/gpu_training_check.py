"""Are training's kernels right on this machine: row mode's output and gradients beside torch's in float64.

Of mul rows alone, without what layers add to them or scale them by: that is torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.bank.pages import NUM_RESERVED
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import ROW_MODE
from workers.row_form.module_index import index_module_group
from workers.row_form.trained_rows import TorchTrainedLoops, TrainedLoops, trained_rows

if TYPE_CHECKING:
    from benchmarks.gpu_check import Mix


def check_training(mix: Mix) -> tuple[float, bool]:
    """The largest error of the output and all gradients, each relative to its largest number; and whether bits change
    the second time on a GPU, or, where nothing is the first adapter's, when that is broken.
    """
    from workers.kernels.trained_rows import KernelTrainedLoops

    loops, dtype = KernelTrainedLoops(), mix.x_TI.dtype
    found = _trained(mix, loops, dtype)
    wanted = _trained(mix, TorchTrainedLoops(), torch.float64)
    errors = [
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
        for one, other in zip(found, wanted, strict=True)
    ]
    again = _trained(mix, loops, dtype) if mix.x_TI.is_cuda else found
    with mix.first_broken():
        broken = _trained(mix, loops, dtype)
    changed = any(
        not (torch.equal(one, other) and torch.equal(one[healthy], beside[healthy]))
        for one, other, beside, healthy in zip(
            found, again, broken, _healthy(mix) if found else (), strict=True
        )
    )
    return max(errors, default=0.0), changed


def _healthy(mix: Mix) -> tuple[Tensor, ...]:
    """What of `_trained` is not the first adapter's."""
    tokens, bank = mix.healthy_tokens(), mix.bank.modules["layer"]
    place = mix.bank.pages_of(mix.versions[0])["layer"]
    sides = []
    for rows, pages in ((bank.in_rows_NI, place.in_pages), (bank.out_rows_NO, place.out_pages)):
        healthy = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        healthy[list(pages)] = False
        sides.append(healthy[NUM_RESERVED:])
    return tokens, tokens, *sides


def _trained(mix: Mix, loops: TrainedLoops, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, dx, db and da, without the pages that nobody trains; nothing for a step without mul rows."""
    index = index_module_group(mix.plan, mix.bank.snapshot.table_of["layer"], ROW_MODE)
    if index.mul is None:
        return ()
    bank, wide = mix.bank.modules["layer"], torch.promote_types(dtype, torch.float32)
    x, b, a = (
        tensor.to(kind, copy=True).requires_grad_()
        for tensor, kind in (
            (mix.x_TI, dtype),
            (bank.in_rows_NI, wide),
            (bank.out_rows_NO, wide),
        )
    )
    base = DenseLinear(mix.layer.weight_OI.to(dtype))
    y = trained_rows(x, base, b, a, index, loops, is_last=True)
    pull = torch.linspace(-1, 1, y.numel(), dtype=dtype, device=y.device).view_as(y)
    dx, db, da = torch.autograd.grad(y, (x, b, a), pull)
    return y.detach(), dx, db[NUM_RESERVED:], da[NUM_RESERVED:]
