"""The kernels' numbers against the float64 definition, in Triton's interpreter: what a GPU would compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.kernels.interpreted import KernelLayers
from tests.workers.row_form.mixed_layers import (
    FAMILIES,
    MIX,
    MIXED_MODES,
    ROW_MODE,
    SEGMENTS,
    SHAPES,
    WEIGHT_MODE,
    mixed_layers,
)
from tests.workers.row_form.test_error_bound import BOUND, own_error, without_contribution
from workers.kernels.product import adapted_product
from workers.kernels.step_tables import index_for_kernels
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import KERNEL_COST, CostModel

MODES = (ROW_MODE, WEIGHT_MODE, MIXED_MODES, KERNEL_COST)


@st.composite
def steps(draw: st.DrawFn) -> KernelLayers:
    size = st.integers(1, 70)
    shapes = {"layer": (draw(size), draw(size))}
    adapter = st.fixed_dictionaries(
        {"layer": st.tuples(st.sampled_from(FAMILIES), st.integers(1, 64))}
    )
    adapters = draw(st.lists(adapter, max_size=4))
    who = st.none() | st.integers(0, len(adapters) - 1) if adapters else st.none()
    length = st.integers(0, 3) | st.integers(0, 40)
    segments = draw(st.lists(st.tuples(length, who), min_size=1, max_size=6))
    return KernelLayers.of(
        mixed_layers(
            seed=draw(st.integers(0, 2**32)),
            shapes=shapes,
            adapters=adapters,
            segments=segments,
            dtype=torch.float32,
        )
    )


@settings(max_examples=12, deadline=None)
@given(steps(), st.sampled_from(MODES))
def test_any_mix_of_families_and_ranks_equals_the_definition(
    mixed: KernelLayers, cost: CostModel
) -> None:
    y, wanted = mixed.output("layer", cost), mixed.reference("layer")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "cost"), [("first", ROW_MODE), ("second", WEIGHT_MODE)], ids=["row", "weight"]
)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 4e-3), (torch.bfloat16, 4e-3), (torch.bfloat16, 1.0)]
)
def test_error_is_small_beside_what_the_adapter_adds(
    path: str, dtype: torch.dtype, size: float, cost: CostModel
) -> None:
    mixed = KernelLayers.of(
        mixed_layers(seed=1, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=dtype, size=size)
    )
    y = mixed.output(path, cost)
    y0 = without_contribution(mixed, path, cost)
    assert own_error(mixed, path, y, y0) <= BOUND[dtype]


@pytest.mark.parametrize("cost", [ROW_MODE, WEIGHT_MODE], ids=["row", "weight"])
def test_dropping_an_adapter_or_swapping_two_is_far_outside_the_bound(cost: CostModel) -> None:
    mixed = KernelLayers.of(
        mixed_layers(
            seed=2, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=torch.float32, size=1e-2
        )
    )
    y0 = without_contribution(mixed, "first", cost)
    assert own_error(mixed, "first", y0, y0) > 0.5, "an ignored adapter must not pass"
    swap = list(mixed.adapters)
    swapped = KernelLayers(
        mixed.layers,
        mixed.bank,
        mixed.adapters,
        [(count, who and swap[(swap.index(who) + 2) % len(swap)]) for count, who in mixed.segments],
        mixed.x,
    )
    assert own_error(mixed, "first", swapped.output("first", cost), y0) > 0.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about the broken values
@pytest.mark.parametrize(
    ("family", "value"),
    [
        ("flora", 3e38), ("flora", float("nan")), ("flora0", float("inf")),
        ("lora", float("nan")), ("dora", float("inf")),
    ],
)  # fmt: skip
def test_a_broken_neighbour_leaves_the_healthy_ones_bits_alone(family: str, value: float) -> None:
    mixed = KernelLayers.of(
        mixed_layers(
            seed=3,
            shapes={"layer": (24, 40)},
            adapters=[{"layer": (family, 3)}, {"layer": ("flora", 1)}, {"layer": ("lora", 8)},
                      {"layer": ("dora", 3)}, {"layer": ("flora", 20)}],
            segments=[(4, 0), (4, 1), (3, None), (4, 3), (20, 0), (20, 2), (1, 4), (1, 0), (30, 4)],
            dtype=torch.float32,
        )
    )  # fmt: skip
    healthy = torch.ones(87, dtype=torch.bool)
    healthy[:4] = healthy[15:35] = healthy[56] = False
    rows, place = mixed.bank.modules["layer"], mixed.bank.pages_of(next(iter(mixed.adapters)))
    for cost in (ROW_MODE, WEIGHT_MODE):
        before = mixed.output("layer", cost)
        kept = rows.in_rows_NI.clone(), rows.out_rows_NO.clone()
        rows.in_rows_NI[list(place["layer"].in_pages)] = value
        rows.out_rows_NO[list(place["layer"].out_pages)] = value
        after = mixed.output("layer", cost)
        assert not torch.equal(before[~healthy], after[~healthy])
        assert torch.equal(before[healthy], after[healthy])
        rows.in_rows_NI.copy_(kept[0])
        rows.out_rows_NO.copy_(kept[1])


@pytest.mark.parametrize("cost", [ROW_MODE, WEIGHT_MODE], ids=["row", "weight"])
def test_more_rows_tokens_and_features_than_one_program_takes(cost: CostModel) -> None:
    mixed = KernelLayers.of(
        mixed_layers(
            seed=5,
            shapes={"layer": (1100, 40)},
            adapters=[{"layer": ("flora", 3)}, {"layer": ("flora+lora", 18)}],
            segments=[(1, 0), (20, 1), (2, None), (130, 0), (1, 1), (9, None)],
            dtype=torch.float32,
        )
    )
    y, wanted = mixed.output("layer", cost), mixed.reference("layer")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_and_a_missing_bias_are_taken_as_they_lie(dtype: torch.dtype) -> None:
    mixed = mixed_layers(
        seed=6,
        shapes={"layer": (24, 40)},
        adapters=[{"layer": ("flora", 2)}, {"layer": ("flora", 5)}],
        segments=[(1, 0), (30, 1), (2, None)],
        dtype=dtype,
    )
    rows, weight_OI = mixed.bank.modules["layer"], mixed.layers["layer"].weight_OI
    tables = index_for_kernels(mixed.plan, mixed.bank.snapshot.table_of["layer"], WEIGHT_MODE)
    both = [
        adapted_product(
            mixed.x["layer"], DenseLinear(weight), rows.in_rows_NI, rows.out_rows_NO, tables
        )
        for weight in (weight_OI, weight_OI.T.contiguous().T)
    ]
    assert torch.equal(*both)
    bias_O = mixed.layers["layer"].bias_O
    assert bias_O is not None
    wanted = mixed.reference("layer") - bias_O.double()
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(both[0].double(), wanted, rtol=limit, atol=limit)


def test_the_output_is_rounded_once_to_the_type_that_is_asked_for() -> None:
    mixed = mixed_layers(
        seed=7,
        shapes={"layer": (24, 40)},
        adapters=[{"layer": ("dora", 2)}, {"layer": ("flora", 5)}],
        segments=[(1, 0), (30, 1), (2, None)],
        dtype=torch.bfloat16,
    )
    rows = mixed.bank.modules["layer"]
    tables = index_for_kernels(mixed.plan, mixed.bank.snapshot.table_of["layer"], WEIGHT_MODE)
    arguments = (mixed.x["layer"], mixed.layers["layer"], rows.in_rows_NI, rows.out_rows_NO, tables)
    exact, rounded = (
        adapted_product(*arguments, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.bfloat16
    # A GPU rounds to the nearest, the interpreter towards zero: one step of the type either way.
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)
