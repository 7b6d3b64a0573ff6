"""What an adapted layer may ask of the frozen layer under it, held for every `BaseLinear`."""

from __future__ import annotations

import pytest
import torch

from workers.row_form.base_linear import BaseLinear, DenseLinear, PackedLinear, padded_rows

LAYERS = {
    "dense": DenseLinear(torch.randn(3, 5), torch.randn(3)),
    "dense without bias": DenseLinear(torch.randn(3, 5).bfloat16()),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_product_is_with_the_weight_its_slices_show_and_leaves_the_bias_out(
    layer: BaseLinear,
) -> None:
    assert isinstance(layer, BaseLinear)
    weight_OI = layer.dequantised_slice(slice(None), slice(None))
    assert weight_OI.shape == (layer.out_features, layer.in_features)
    assert weight_OI.dtype == layer.dtype
    x_TI = torch.randn(4, layer.in_features).to(layer.dtype)
    y_TO = layer.matmul(x_TI)
    assert y_TO.dtype == layer.dtype
    torch.testing.assert_close(y_TO, x_TI @ weight_OI.T)
    assert torch.equal(layer.dequantised_slice(slice(1, 3), slice(0, 2)), weight_OI[1:3, 0:2])


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on() -> None:
    layer = DenseLinear(torch.randn(3, 5))
    x_TI = torch.randn(2, 5, requires_grad=True)
    layer.matmul(x_TI).sum().backward()
    assert layer.weight_OI.grad is None
    assert x_TI.grad is not None


def packed(num_out: int, num_in: int) -> PackedLinear:
    weight_OI = torch.randn(num_out, num_in).bfloat16()
    if not PackedLinear.is_supported(weight_OI):
        pytest.skip("this processor's matrix library does not pack bfloat16")
    return PackedLinear(weight_OI)


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 300])
def test_packed_rows_are_the_dense_ones_whatever_their_number(num_rows: int) -> None:
    layer = packed(num_out=48, num_in=40)
    x_TI = torch.randn(num_rows, 40).bfloat16()
    dense = DenseLinear(layer.weight_OI)
    torch.testing.assert_close(layer.matmul(x_TI), dense.matmul(x_TI), rtol=2**-7, atol=2**-7)
    assert layer.matmul(x_TI[None]).shape == (1, num_rows, 48)


def test_a_packed_row_is_the_same_beside_any_others() -> None:
    layer = packed(num_out=48, num_in=40)
    x_TI = torch.randn(9, 40).bfloat16()
    alone = layer.matmul(x_TI[:1])
    x_TI[1:] = torch.nan
    assert torch.equal(layer.matmul(x_TI)[:1], alone)


def test_row_counts_are_few_and_never_too_small() -> None:
    counts = range(2049)
    assert all(count <= padded_rows(count) <= count + max(15, count // 8) for count in counts)
    assert len({padded_rows(count) for count in counts}) < 50
