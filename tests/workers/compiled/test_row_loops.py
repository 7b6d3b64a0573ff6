"""Compiled loops against the torch product they replace, which is itself held to the definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.compiled.compiler import library
from tests.workers.row_form.mixed_layers import FAMILIES, MixedLayers, mixed_layers
from workers.compiled.row_loops import RowLoops
from workers.row_form.adapted_linear import AdaptedLinear, AdapterLayers, StepContext
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.joint_linear import JointLinear

NEVER = 10**9
ROW_MODE = CostModel(build_rows=1e9, build_rows_per_rank=0, thin_product_tokens=NEVER)
WEIGHT_MODE = CostModel(build_rows=-1e9, build_rows_per_rank=0, thin_product_tokens=NEVER)
MIXED_MODES = CostModel(build_rows=4, build_rows_per_rank=0, thin_product_tokens=NEVER)
MODES = (ROW_MODE, WEIGHT_MODE, MIXED_MODES)
# Neither a multiple of the lanes, nor too small for whole ones.
SHAPES = {"first": (37, 70), "second": (64, 48)}


def row_loops(dtype: torch.dtype) -> RowLoops:
    return RowLoops(library(), dtype)


@st.composite
def mixtures(draw: st.DrawFn, dtype: torch.dtype) -> MixedLayers:
    kinds = st.tuples(st.sampled_from(FAMILIES), st.integers(1, 64))
    adapters = draw(st.lists(st.fixed_dictionaries({p: kinds for p in SHAPES}), max_size=6))
    users = st.one_of(st.none(), st.integers(0, len(adapters) - 1)) if adapters else st.none()
    segments = draw(st.lists(st.tuples(st.integers(1, 20), users), min_size=1, max_size=8))
    return mixed_layers(
        seed=draw(st.integers(0, 99)),
        shapes=SHAPES,
        adapters=adapters,
        segments=segments,
        dtype=dtype,
        num_rows=1024,
    )


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "mixed"])
@given(mixed=mixtures(torch.float32))
@settings(max_examples=30, deadline=None)
def test_any_mix_equals_torch_in_float32(mixed: MixedLayers, cost: CostModel) -> None:
    product = row_loops(torch.float32).product
    for path in SHAPES:
        expected = mixed.output(path, cost)
        torch.testing.assert_close(
            mixed.output(path, cost, product), expected, rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "mixed"])
@given(mixed=mixtures(torch.bfloat16))
@settings(max_examples=30, deadline=None)
def test_any_mix_equals_torch_to_one_rounding_in_bfloat16(
    mixed: MixedLayers, cost: CostModel
) -> None:
    product = row_loops(torch.bfloat16).product
    for path in SHAPES:
        expected = mixed.output(path, cost).to(torch.bfloat16)
        torch.testing.assert_close(
            mixed.output(path, cost, product), expected, rtol=2**-7, atol=1e-4
        )


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "mixed"])
@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["flora", "flora0", "lora", "dora", "ia3_in", "ia3_out"])
def test_a_broken_neighbour_leaves_the_healthy_ones_bits_alone(
    family: str, value: float, cost: CostModel
) -> None:
    mixed = mixed_layers(
        seed=3,
        shapes=SHAPES,
        adapters=[
            {path: (family, 3) for path in SHAPES},
            {path: ("flora", 2) for path in SHAPES},
            {path: ("dora", 4) for path in SHAPES},
        ],
        segments=[(4, 0), (4, 1), (3, None), (4, 2), (20, 0), (20, 1), (1, 2)],
        dtype=torch.float32,
    )
    healthy = torch.ones(56, dtype=torch.bool)
    healthy[:4] = healthy[15:35] = False
    broken = next(iter(mixed.adapters))
    product = row_loops(torch.float32).product
    for path in SHAPES:
        before = mixed.output(path, cost, product)
        rows, place = mixed.bank.modules[path], mixed.bank.pages_of(broken)[path]
        rows.in_rows_NI[list(place.in_pages)] = value
        rows.out_rows_NO[list(place.out_pages)] = value
        after = mixed.output(path, cost, product)
        assert not torch.equal(before[~healthy], after[~healthy])
        assert torch.equal(before[healthy], after[healthy])


@pytest.mark.parametrize(
    "families", [("lora", "dora"), ("flora", "lora"), ("untouched", "ia3_out")]
)
def test_projections_run_together_equal_those_run_apart(families: tuple[str, str]) -> None:
    shapes = {"query": (48, 40), "key": (48, 24), "value": (48, 24)}
    mixed = mixed_layers(
        seed=5,
        shapes=shapes,
        adapters=[{path: (family, 2) for path in shapes} for family in families],
        segments=[(3, 0), (2, None), (4, 1)],
        dtype=torch.float32,
    )
    x_TI = mixed.x["query"]
    rows = row_loops(torch.float32)
    together, apart = (_layers(mixed, product) for product in (rows.product, adapted_product))
    joint = JointLinear(list(together.layers.values()), DenseLinear, rows)
    for plan in (mixed.plan, None):
        together.begin_step(plan)
        apart.begin_step(plan)
        outputs = joint(x_TI)
        for path, output in zip(shapes, outputs, strict=True):
            torch.testing.assert_close(output, apart.layers[path](x_TI), rtol=2e-5, atol=2e-5)


def _layers(mixed: MixedLayers, product: Callable[..., Tensor]) -> AdapterLayers:
    context = StepContext(ROW_MODE, product)
    layers = AdapterLayers(
        {
            path: AdaptedLinear(path, DenseLinear(base.weight_OI, base.bias_O), context)
            for path, base in mixed.layers.items()
        },
        context,
    )
    layers.bind(mixed.bank)
    return layers
