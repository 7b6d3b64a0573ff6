"""The safetensors container: 8 bytes of header length, a JSON header, raw little-endian tensor bytes.

Read and written here because the header holds what the `safetensors` package does not return with the tensors (the
metadata), and because that package writes metadata in random order: the same tensors would get another digest.
Knows nothing of torch. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_NUM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class MalformedFileError(ValueError):
    """The bytes are not a safetensors file; says what is wrong with them."""


class TensorEntry(NamedTuple):
    """One tensor; its bytes are [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in the order of their bytes, which lie side by side to the end of the file."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(file: bytes | memoryview) -> Header:
    """The header of a whole file, checked against the file's size. Raises MalformedFileError."""
    if len(file) < _LENGTH_BYTES:
        raise MalformedFileError("it is shorter than its header")
    data_start = _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES], "little")
    if data_start > min(len(file), _LENGTH_BYTES + MAX_HEADER_BYTES):
        raise MalformedFileError("its header does not fit into it")
    try:
        parsed = json.loads(bytes(file[_LENGTH_BYTES:data_start]))
    except (ValueError, RecursionError):
        raise MalformedFileError("its header is not JSON") from None
    if not isinstance(parsed, dict):
        raise MalformedFileError("its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise MalformedFileError("its metadata is not text by name")
    tensors = sorted(
        ((name, _entry(name, described, data_start)) for name, described in parsed.items()),
        key=lambda named: named[1][2:],
    )
    _check_side_by_side(tensors, data_start, len(file))
    return Header(dict(tensors), metadata)


def build_file(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: Mapping[str, str]
) -> bytes:
    """A file with these tensors, (dtype, shape, bytes) by name. Equal arguments give equal bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    # Wide types first keeps every tensor aligned to its own width.
    order = sorted(tensors, key=lambda name: (-_NUM_BITS[tensors[name][0]], name))
    for name in order:
        dtype, shape, data = tensors[name]
        stop = position + len(data)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join(
        [len(text).to_bytes(_LENGTH_BYTES, "little"), text, *(tensors[name][2] for name in order)]
    )


def _entry(name: str, described: object, data_start: int) -> TensorEntry:
    fields = described if isinstance(described, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    # Not a `match`: an adapter has hundreds of these and is read while others wait; that took five times as long.
    if (
        not isinstance(dtype, str)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise MalformedFileError(f"its header does not describe tensor {name!r}")
    if dtype not in _NUM_BITS:
        raise MalformedFileError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    start, stop = offsets
    if (stop - start) * 8 != math.prod(shape) * _NUM_BITS[dtype]:
        raise MalformedFileError(f"tensor {name!r} has another size than its shape")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_side_by_side(
    tensors: Sequence[tuple[str, TensorEntry]], data_start: int, num_bytes: int
) -> None:
    """The format allows no bytes that belong to no tensor, or to two."""
    position = data_start
    for name, entry in tensors:
        if entry.stop > num_bytes:
            raise MalformedFileError(f"tensor {name!r} lies outside the file")
        if entry.start != position:
            raise MalformedFileError(f"tensor {name!r} does not begin where the one before it ends")
        position = entry.stop
    if position != num_bytes:
        raise MalformedFileError("it goes on after its last tensor")
