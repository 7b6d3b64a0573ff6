"""How runners and training compute: the one place where device and element type decide between implementations.

All of them give the same results up to rounding; torch's run everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from workers.compiled.decoder_loops import CompiledDecoderLoops, SlabLoops
from workers.compiled.library import compiled_loops, is_compiled_type
from workers.compiled.row_loops import RowLoops
from workers.compiled.trained_rows import CompiledTrainedLoops
from workers.kernels.step_tables import index_for_kernels
from workers.models.native.decoder_loops import DecoderLoops, TorchDecoderLoops
from workers.row_form.adapted_linear import LookUp, Product
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import BaseLinear, DenseLinear, serving_linear
from workers.row_form.cost import KERNEL_COST, CostModel
from workers.row_form.joint_linear import Epilogue
from workers.row_form.module_index import index_module_group
from workers.row_form.trained_rows import TorchTrainedLoops, TrainedLoops


@dataclass(frozen=True)
class Arithmetic:
    """What a runner is made of; for inference only."""

    make_linear: Callable[[Tensor, Tensor | None], BaseLinear] = DenseLinear
    product: Product = adapted_product
    look_up: LookUp = index_module_group
    epilogue: Epilogue | None = None
    decoder: DecoderLoops = field(default_factory=TorchDecoderLoops)
    slabs: SlabLoops | None = None
    cost: CostModel | None = None  # None: to be measured
    has_kernels: bool = False


def choose_arithmetic(
    dtype: torch.dtype, device: torch.device, *, head_dim: int, compiled: bool = True
) -> Arithmetic:
    """The fastest there is.

    Args:
        compiled: false: torch's own operations only.
    """
    if compiled and device.type == "cuda" and _is_kernel_type(dtype):
        return kernel_arithmetic()
    loops = compiled_loops() if compiled and device.type == "cpu" else None
    if loops is None or not is_compiled_type(dtype):
        return Arithmetic(make_linear=serving_linear)
    rows = RowLoops(loops, dtype)
    return Arithmetic(
        make_linear=serving_linear,
        product=rows.product,
        epilogue=rows,
        decoder=CompiledDecoderLoops(loops, dtype),
        slabs=SlabLoops(loops, dtype) if SlabLoops.is_supported(head_dim) else None,
    )


def choose_trained_loops(dtype: torch.dtype, device: torch.device) -> TrainedLoops:
    """The fastest there is for training over a base of this type, its rows in float32."""
    if device.type == "cuda" and _is_kernel_type(dtype):
        from workers.kernels.trained_rows import KernelTrainedLoops

        return KernelTrainedLoops()
    loops = compiled_loops() if device.type == "cpu" and is_compiled_type(dtype) else None
    return TorchTrainedLoops() if loops is None else CompiledTrainedLoops(loops, dtype)


def _is_kernel_type(dtype: torch.dtype) -> bool:
    """Whether Triton is there, and this type is one the kernels compute in."""
    return (
        dtype in (torch.float32, torch.bfloat16, torch.float16) and find_spec("triton") is not None
    )


def kernel_arithmetic() -> Arithmetic:
    """A GPU's. Needs the triton package, which comes with torch's builds for GPUs."""
    from workers.kernels.decoder_loops import KernelDecoderLoops
    from workers.kernels.product import KernelRows

    rows = KernelRows()
    return Arithmetic(
        product=rows.product,
        look_up=index_for_kernels,
        epilogue=rows,
        decoder=KernelDecoderLoops(),
        cost=KERNEL_COST,
        has_kernels=True,
    )
