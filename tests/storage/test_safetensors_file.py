"""Our container is the `safetensors` package's container, and a damaged one is never half read."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.safetensors_file import MalformedFileError, build_file, read_header

_TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.ones(0, 4),
    "one": torch.tensor(7, dtype=torch.int64),
}


def test_headers_of_the_package_are_understood() -> None:
    file = safetensors.torch.save(_TENSORS, {"key": "value"})
    header = read_header(file)
    assert header.metadata == {"key": "value"}
    assert set(header.tensors) == set(_TENSORS)
    starts = [entry.start for entry in header.tensors.values()]
    assert starts == sorted(starts)
    for name, entry in header.tensors.items():
        assert entry.shape == tuple(_TENSORS[name].shape)
        expected = _TENSORS[name].flatten().view(torch.uint8) if _TENSORS[name].numel() else b""
        assert file[entry.start : entry.stop] == bytes(expected)


def test_files_built_here_are_read_by_the_package() -> None:
    names = {torch.float64: "F64", torch.uint8: "U8", torch.bfloat16: "BF16", torch.int64: "I64"}
    parts = {
        name: (
            names.get(tensor.dtype, "F32"),
            tuple(tensor.shape),
            bytes(tensor.flatten().view(torch.uint8)) if tensor.numel() else b"",
        )
        for name, tensor in _TENSORS.items()
    }
    file = build_file(parts, {"b": "é", "a": "1"})
    found = safetensors.torch.load(file)
    assert set(found) == set(_TENSORS)
    for name, tensor in _TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert read_header(file).metadata == {"a": "1", "b": "é"}


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


def test_the_file_all_these_damages_start_from_is_good() -> None:
    assert read_header(_file(_tensor(), bytes(4))).tensors["x"].shape == (1,)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        _file(b"{"),
        _file(b"\xff\xfe"),
        _file([]),
        _file(b"[" * 100_000),
        _file({"__metadata__": {"a": 1}}),
        _file({"__metadata__": []}),
        _file({"x": 1}),
        _file(_tensor(), bytes(3)),
        _file(_tensor(dtype="F31"), bytes(4)),
        _file(_tensor(dtype=7), bytes(4)),
        _file(_tensor(shape=[2]), bytes(4)),
        _file(_tensor(shape=[-1]), bytes(4)),
        _file(_tensor(shape=["1"]), bytes(4)),
        _file(_tensor(shape=4), bytes(4)),
        _file(_tensor(data_offsets=[-4, 0]), bytes(4)),
        _file(_tensor(data_offsets=[4, 0]), bytes(4)),
        _file(_tensor(data_offsets=[0]), bytes(4)),
        _file(_tensor(data_offsets=[0.0, 4.0]), bytes(4)),
        _file(_tensor(data_offsets=[False, 4]), bytes(4)),
        _file(_tensor(data_offsets=[4, 8]), bytes(8)),
        _file(_tensor(), bytes(5)),
        _file(_tensor() | {"y": _tensor()["x"]}, bytes(4)),
        _file(_tensor() | {"y": _tensor(data_offsets=[2, 6])["x"]}, bytes(6)),
    ],
)
def test_a_damaged_header_is_refused(file: bytes) -> None:
    with pytest.raises(MalformedFileError):
        read_header(file)


@given(st.binary(max_size=100))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    with pytest.raises(MalformedFileError):
        read_header(data + b"\0")
