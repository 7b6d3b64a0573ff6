"""An adapter's tensors are read as the `safetensors` package reads them, and no value slips through."""

from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.formats.tensors import MAX_ABSOLUTE_VALUE, read_tensors

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def _file(tensors: dict[str, Tensor]) -> bytes:
    """In the order given, so that a wide tensor may lie where its type is not aligned."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        stored = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += stored
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    seed = draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    kinds = draw(
        st.lists(
            st.tuples(
                st.sampled_from(list(_NAMES)), st.lists(st.integers(0, 5), min_size=1, max_size=3)
            ),
            min_size=1,
            max_size=6,
        )
    )
    return {
        f"t{place}": torch.randn(shape, generator=generator).to(dtype)
        for place, (dtype, shape) in enumerate(kinds)
    }


@given(_tensors())
def test_tensors_of_any_types_and_shapes_are_what_the_package_reads(
    tensors: dict[str, Tensor],
) -> None:
    file = _file(tensors)
    read, metadata = read_tensors("file", file)
    expected = safetensors.torch.load(file)
    assert not metadata
    assert {name: (one.dtype, one.shape) for name, one in read.items()} == {
        name: (one.dtype, one.shape) for name, one in expected.items()
    }
    assert all(torch.equal(read[name], expected[name]) for name in tensors)


@given(_tensors(), st.integers(0, 1 << 20), st.sampled_from([1, -1]), st.booleans())
def test_one_value_that_is_too_large_is_found_and_its_tensor_named(
    tensors: dict[str, Tensor], place: int, sign: int, is_finite: bool
) -> None:
    names = [name for name, tensor in tensors.items() if tensor.numel()]
    if not names:
        return
    name = names[place % len(names)]
    value = sign * (2 * MAX_ABSOLUTE_VALUE if is_finite else math.inf)
    tensors[name].view(-1)[place % tensors[name].numel()] = value
    told = "the value" if is_finite else "values that are not finite"
    with pytest.raises(AdapterRefusedError, match=f"tensor '{name}' has {told}"):
        read_tensors("file", _file(tensors))


@pytest.mark.parametrize("dtype", _NAMES)
def test_not_a_number_is_found_among_numbers(dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(3, 4, dtype=dtype) for name in "abc"}
    tensors["b"][2, 1] = math.nan
    with pytest.raises(AdapterRefusedError, match="tensor 'b' has values that are not finite"):
        read_tensors("file", _file(tensors))


def test_what_is_read_is_a_copy() -> None:
    file = _file({"a": torch.ones(3), "b": torch.ones(2)})
    read, _ = read_tensors("file", file)
    read["a"][:] = 2
    assert read["b"].tolist() == [1, 1]
    assert read_tensors("file", file)[0]["a"].tolist() == [1, 1, 1]


def test_a_tensor_keeps_no_more_memory_than_its_own() -> None:
    read, _ = read_tensors("file", _file({"small": torch.ones(3), "large": torch.ones(1000)}))
    assert read["small"].untyped_storage().nbytes() == 12
