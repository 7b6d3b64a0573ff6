"""The tensors of an adapter's file, let in only if they can be served."""

from __future__ import annotations

import math
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.safetensors_file import MalformedFileError, build_file, read_header

MAX_ABSOLUTE_VALUE = 1e4

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def read_tensors(name: str, file: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, on the CPU and sharing no memory with `file`, and the file's metadata.

    Raises:
        AdapterRefusedError: not a safetensors file; or a tensor has a dtype that is no float of 16 to 64 bits, a
            value that is not finite, or one above `MAX_ABSOLUTE_VALUE`. Names the tensor.
    """
    try:
        header = read_header(file)
        for tensor_name, entry in header.tensors.items():
            if entry.dtype not in _DTYPE_NAMES.values():
                raise AdapterRefusedError(
                    f"tensor {tensor_name!r} has dtype {entry.dtype}; expected one of "
                    f"{', '.join(_DTYPE_NAMES.values())}"
                )
        tensors: dict[str, Tensor] = safetensors.torch.load(file)
    except (MalformedFileError, SafetensorError) as error:
        raise AdapterRefusedError(f"{name} is not a safetensors file: {error}") from None
    for tensor_name, tensor in tensors.items():
        _check_values(tensor_name, tensor)
    return tensors, header.metadata


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Equal tensors give equal bytes, whatever their order, strides and device."""
    return build_file(
        {
            name: (
                _DTYPE_NAMES[tensor.dtype],
                tuple(tensor.shape),
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(),
            )
            for name, tensor in tensors.items()
        },
        metadata,
    )


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    largest = float(tensor.abs().max())  # NaN if there is one
    if not math.isfinite(largest):
        raise AdapterRefusedError(f"tensor {name!r} has values that are not finite (NaN or inf)")
    if largest > MAX_ABSOLUTE_VALUE:
        raise AdapterRefusedError(
            f"tensor {name!r} has the value {largest:.3g}; at most {MAX_ABSOLUTE_VALUE:.0f} is accepted"
        )
