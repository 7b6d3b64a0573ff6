"""Row mode's backward written by hand, against autograd through the plain product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.compiled.compiler import library
from tests.workers.row_form.mixed_layers import (
    FAMILIES,
    MIX,
    MIXED_MODES,
    ROW_MODE,
    SEGMENTS,
    WEIGHT_MODE,
    MixedLayers,
    mixed_layers,
)
from workers.bank.pages import NULL_PAGE
from workers.compiled.trained_rows import CompiledTrainedLoops
from workers.row_form.adapted_linear import Product
from workers.row_form.adapted_product import TrainedProduct, adapted_product
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group
from workers.row_form.trained_rows import TorchTrainedLoops

# Neither a multiple of the compiled loops' lanes, nor too small for whole ones.
SHAPES = {"first": (37, 70), "second": (64, 48)}
NAMES = ("y", "dx", "db", "da")


@st.composite
def mixtures(draw: st.DrawFn, dtype: torch.dtype) -> MixedLayers:
    kinds = st.tuples(st.sampled_from(FAMILIES), st.integers(1, 64))
    adapters = draw(
        st.lists(st.fixed_dictionaries({p: kinds for p in SHAPES}), min_size=1, max_size=5)
    )
    users = st.one_of(st.none(), st.integers(0, len(adapters) - 1))
    segments = draw(st.lists(st.tuples(st.integers(1, 20), users), min_size=1, max_size=6))
    return mixed_layers(
        seed=draw(st.integers(0, 99)),
        shapes=SHAPES,
        adapters=adapters,
        segments=segments,
        dtype=dtype,
        num_rows=512,
    )


def forward_and_backward(
    mixed: MixedLayers,
    path: str,
    cost: CostModel,
    product: Product,
    dtype: torch.dtype,
    rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The output and the gradients of x, the in rows and the out rows. `dtype`: of x and base."""
    module = mixed.bank.modules[path]
    wide = torch.promote_types(dtype, torch.float32)
    sides = rows or (module.in_rows_NI, module.out_rows_NO)
    x, b, a = (
        tensor.detach().to(kind, copy=True).requires_grad_()
        for tensor, kind in zip((mixed.x[path], *sides), (dtype, wide, wide), strict=True)
    )
    layer = mixed.layers[path]
    base = DenseLinear(layer.weight_OI.to(dtype), None)
    index = index_module_group(mixed.plan, mixed.bank.snapshot.table_of[path], cost)
    y = product(x, base, b, a, index)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((y * pull.to(y.dtype)).sum(), (x, b, a), allow_unused=True)
    return (
        y.detach(),
        *(
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip((x, b, a), gradients, strict=True)
        ),
    )


@pytest.mark.parametrize("cost", [ROW_MODE, MIXED_MODES], ids=["row", "mixed"])
@given(mixed=mixtures(torch.float64))
@settings(max_examples=30, deadline=None)
def test_any_mix_and_its_gradients_equal_autograd_in_float64(
    mixed: MixedLayers, cost: CostModel
) -> None:
    for path in SHAPES:
        expected = forward_and_backward(mixed, path, cost, adapted_product, torch.float64)
        product = TrainedProduct(TorchTrainedLoops())
        found = forward_and_backward(mixed, path, cost, product, torch.float64)
        for name, one, other in zip(NAMES, found, expected, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=["f32", "bf16"]
)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_compiled_loops_equal_autograd_in_float64(
    dtype: torch.dtype, bound: float, data: st.DataObject
) -> None:
    """Relative to the largest number, from the same rounded inputs; rows are float32 over either base."""
    mixed = data.draw(mixtures(torch.float32))
    exact = replace(
        mixed,
        x={path: x.to(dtype).double() for path, x in mixed.x.items()},
        layers={
            p: DenseLinear(one.weight_OI.to(dtype).double()) for p, one in mixed.layers.items()
        },
    )
    product = TrainedProduct(CompiledTrainedLoops(library(), dtype))
    for path in SHAPES:
        expected = forward_and_backward(exact, path, ROW_MODE, adapted_product, torch.float64)
        found = forward_and_backward(mixed, path, ROW_MODE, product, dtype)
        for name, one, other in zip(NAMES, found, expected, strict=True):
            scale = float(other.abs().max()) + 1e-3
            assert float((one - other).abs().max()) <= bound * scale, name


@given(mixed=mixtures(torch.float32))
@settings(max_examples=30, deadline=None)
def test_weight_mode_over_a_bfloat16_base_has_the_gradients_of_float64(mixed: MixedLayers) -> None:
    """Rows are float32; its products and what they are made of are bfloat16."""
    dtype = torch.bfloat16
    exact = replace(
        mixed,
        x={path: x.to(dtype).double() for path, x in mixed.x.items()},
        layers={
            p: DenseLinear(one.weight_OI.to(dtype).double()) for p, one in mixed.layers.items()
        },
    )
    for path in SHAPES:
        expected = forward_and_backward(exact, path, ROW_MODE, adapted_product, torch.float64)
        found = forward_and_backward(mixed, path, WEIGHT_MODE, adapted_product, dtype)
        for name, one, other in zip(NAMES, found, expected, strict=True):
            assert float((one - other).norm()) <= 2e-2 * (float(other.norm()) + 1e-3), name


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_broken_adapter_reaches_no_other_token_and_no_other_row(
    value: float, is_compiled: bool
) -> None:
    mixed = mixed_layers(
        seed=5, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=torch.float32
    )
    loops = CompiledTrainedLoops(library(), torch.float32) if is_compiled else TorchTrainedLoops()
    product = TrainedProduct(loops)
    healthy = forward_and_backward(mixed, "second", ROW_MODE, product, torch.float32)
    broken_number = 3  # FLoRA beside LoRA in this layer
    version = list(mixed.adapters)[broken_number]
    pages = mixed.bank.pages_of(version)["second"]
    module = mixed.bank.modules["second"]
    rows = (module.in_rows_NI.clone(), module.out_rows_NO.clone())
    rows[0][list(pages.mul_in)] = value
    rows[1][list(pages.mul_out)] = value
    found = forward_and_backward(mixed, "second", ROW_MODE, product, torch.float32, rows)

    theirs = torch.tensor([v == version for count, v in mixed.segments for _ in range(count)])
    in_pages, out_pages = (torch.zeros(len(side), dtype=torch.bool) for side in rows)
    in_pages[list(pages.in_pages)] = True
    out_pages[list(pages.out_pages)] = True
    in_pages[NULL_PAGE] = out_pages[NULL_PAGE] = True  # nobody's, and never trained
    for one, other, own in zip(found, healthy, (theirs, theirs, in_pages, out_pages), strict=True):
        assert torch.equal(one[~own], other[~own])
    assert not found[0][theirs].isfinite().all(), "the twin: it is broken where it is used"


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    mixed = mixed_layers(
        seed=6, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=torch.float32
    )
    product = TrainedProduct(CompiledTrainedLoops(library(), torch.float32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                forward_and_backward(mixed, "first", ROW_MODE, product, torch.float32)[2:]
            )
    finally:
        torch.set_num_threads(before)
    # The products themselves may differ in their last bit between numbers of threads; sums over rows add nothing.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
