"""The tensors of an adapter's file, let in only if they can be served."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.safetensors_file import MalformedFileError, TensorEntry, build_file, read_header
from storage.values import largest_value

MAX_ABSOLUTE_VALUE = 1e4

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_tensors(name: str, file: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, on the CPU and sharing no memory with `file`, and the file's metadata.

    Raises:
        AdapterRefusedError: not a safetensors file; or a tensor has a dtype that is no float of 16 to 64 bits, a
            value that is not finite, or one above `MAX_ABSOLUTE_VALUE`. Names the tensor.
    """
    try:
        header = read_header(file)
    except MalformedFileError as error:
        raise AdapterRefusedError(f"{name} is not a safetensors file: {error}") from None
    for tensor_name, entry in header.tensors.items():
        if entry.dtype not in _DTYPES:
            raise AdapterRefusedError(
                f"tensor {tensor_name!r} has dtype {entry.dtype}; expected one of {', '.join(_DTYPES)}"
            )
    view = memoryview(file)
    tensors = {
        tensor_name: _tensor(view[entry.start : entry.stop], entry)
        for tensor_name, entry in header.tensors.items()
    }
    _check_values(tensors)
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


def _tensor(data: memoryview, entry: TensorEntry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry.shape)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    if largest_value(tensors.values()) <= MAX_ABSOLUTE_VALUE:
        return
    for name, tensor in tensors.items():
        largest = largest_value([tensor])
        if not math.isfinite(largest):
            raise AdapterRefusedError(
                f"tensor {name!r} has values that are not finite (NaN or inf)"
            )
        if largest > MAX_ABSOLUTE_VALUE:
            raise AdapterRefusedError(
                f"tensor {name!r} has the value {largest:.3g}; at most {MAX_ABSOLUTE_VALUE:.0f} is accepted"
            )
