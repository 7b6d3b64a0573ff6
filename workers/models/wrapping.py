"""Put adapted layers in a transformers model, without editing its files."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from storage.errors import InvalidRequestError
from workers.row_form.adapted_linear import AdaptedLinear, AdapterLayers, Product, StepContext
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import BaseLinear, DenseLinear
from workers.row_form.cost import CostModel


def wrap_linears(
    model: nn.Module,
    cost: CostModel,
    *,
    product: Product = adapted_product,
    make_linear: Callable[[Tensor, Tensor | None], BaseLinear] = DenseLinear,
    is_projection: Callable[[str], bool] = lambda path: not path.endswith("lm_head"),
) -> AdapterLayers:
    """Replace every `nn.Linear` of the decoder by an `AdaptedLinear` over the same weight, and freeze the model.

    Args:
        model: changed in place; its weights are shared, not copied.
        cost: how layers choose between row mode and weight mode.
        product: how a layer with adapters is computed.
        make_linear: the base layer over a weight_OI and a bias_O.
        is_projection: which linear layers may be adapted, by module path; by default all but the output head.

    Raises:
        InvalidRequestError: the model has no linear layer of that kind.
    """
    model.requires_grad_(False)
    context = StepContext(cost, product)
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_projection(path)
    }
    if not linears:
        raise InvalidRequestError(f"{type(model).__name__} has no linear layer to adapt")
    layers = {}
    for path, linear in linears.items():
        layer = AdaptedLinear(path, make_linear(linear.weight, linear.bias), context)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer
    return AdapterLayers(layers, context)
