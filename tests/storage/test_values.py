"""The largest of many values, whoever holds it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.values import largest_value

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@given(
    st.lists(st.tuples(st.sampled_from(_DTYPES), st.integers(0, 5)), max_size=150),
    st.integers(0, 1 << 20),
)
def test_it_is_what_one_finds_tensor_by_tensor(
    kinds: list[tuple[torch.dtype, int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, 2, generator=generator).to(dtype) for dtype, size in kinds]
    expected = max((float(one.abs().max()) for one in tensors if one.numel()), default=0.0)
    assert largest_value(tensors) == expected


@pytest.mark.parametrize("place", [0, 63, 64, 129])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_found_in_any_tensor(place: int, value: float) -> None:
    tensors = [torch.full((2, 3), 1e4) for _ in range(130)]
    tensors[place][1, 2] = value
    found = largest_value(tensors)
    assert math.isnan(found) if math.isnan(value) else found == math.inf
