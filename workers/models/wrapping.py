"""Put adapted layers in a transformers model, without editing its files.

A projection is a linear layer as the model has it, by the module path under which PEFT names it: a fused one
(Phi-3's `qkv_proj`, GPT-2's `c_attn`) is one projection.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from storage.errors import InvalidRequestError
from workers.row_form.adapted_linear import (
    AdaptedLinear,
    AdapterLayers,
    LookUp,
    Product,
    StepContext,
)
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import BaseLinear, DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Every layer that adapters may name, by module path: all linear ones but the output head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def wrap_linears(
    model: PreTrainedModel,
    cost: CostModel,
    *,
    product: Product = adapted_product,
    look_up: LookUp = index_module_group,
    make_linear: Callable[[Tensor, Tensor | None], BaseLinear] = DenseLinear,
) -> AdapterLayers:
    """Replace every one of `linear_layers` by an `AdaptedLinear` over the same weight, and freeze the model.

    Args:
        model: changed in place; its weights are shared, not copied.
        cost: how layers choose between row mode and weight mode.
        product, look_up: how a layer with adapters is computed, and from which index.
        make_linear: the base layer over a weight_OI and a bias_O.

    Raises:
        InvalidRequestError: the model has no such layer.
    """
    model.requires_grad_(False)
    context = StepContext(cost, product, look_up)
    layers = {}
    for path, linear in linear_layers(model).items():
        # Conv1D stores its weight_IO: seen from the other side, not copied.
        weight_OI = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        layer = AdaptedLinear(path, make_linear(weight_OI, linear.bias), context)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        layers[path] = layer
    if not layers:
        raise InvalidRequestError(f"{type(model).__name__} has no linear layer to adapt")
    return AdapterLayers(layers, context)
