"""What an adapted layer may ask of the frozen layer under it, held for every `BaseLinear`."""

from __future__ import annotations

import pytest
import torch

from workers.row_form.base_linear import BaseLinear, DenseLinear

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
