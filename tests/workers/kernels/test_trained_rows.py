"""Training's loops as kernels, in Triton's interpreter, beside torch's own and the float64 definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.row_form.mixed_layers import (
    FAMILIES,
    MIXED_MODES,
    ROW_MODE,
    MixedLayers,
    mixed_layers,
)
from tests.workers.row_form.test_trained_rows import NAMES, forward_and_backward
from workers.bank.layout import SlotPages
from workers.bank.pages import NUM_RESERVED
from workers.kernels.trained_rows import KernelTrainedLoops
from workers.models.arithmetic import choose_trained_loops
from workers.row_form.adapted_product import TrainedProduct, adapted_product
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group
from workers.row_form.page_rows import PART_ROWS, PageRows
from workers.row_form.trained_rows import TorchTrainedLoops

PRODUCT = TrainedProduct(KernelTrainedLoops())
# bfloat16 is rounded towards zero in the interpreter, to the nearest on a GPU.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


# A program of the interpreter takes a millisecond, and there is one for every page.
NUM_ROWS = 40
SHAPES = {"layer": (20, 70)}


@st.composite
def mixtures(draw: st.DrawFn) -> MixedLayers:
    """The first adapter has mul rows, and its first run is too short for weight mode."""
    first = st.tuples(st.sampled_from(("flora", "flora0", "flora+lora")), st.integers(1, 5))
    others = st.lists(st.tuples(st.sampled_from(FAMILIES), st.integers(1, 5)), max_size=2)
    adapters = [{"layer": kind} for kind in [draw(first), *draw(others)]]
    users = st.one_of(st.none(), st.integers(0, len(adapters) - 1))
    more = st.lists(st.tuples(st.integers(1, 12), users), max_size=4)
    segments = [(draw(st.integers(1, 2)), 0), *draw(more)]
    return mixed_layers(
        seed=draw(st.integers(0, 99)),
        shapes=SHAPES,
        adapters=adapters,
        segments=segments,
        dtype=torch.float32,
        num_rows=NUM_ROWS,
    )


def rounded(mixed: MixedLayers, dtype: torch.dtype) -> MixedLayers:
    """The same in float64, of the values that x and base have in `dtype`."""
    return replace(
        mixed,
        x={path: x.to(dtype).double() for path, x in mixed.x.items()},
        layers={
            p: DenseLinear(one.weight_OI.to(dtype).double()) for p, one in mixed.layers.items()
        },
    )


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], bound: float) -> None:
    """Relative to the largest number. Nobody trains the reserved pages."""
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        first = NUM_RESERVED if name in ("da", "db") else 0
        one, other = one[first:].double(), other[first:].double()
        scale = float(other.abs().max()) + 1e-3
        assert float((one - other).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("cost", [ROW_MODE, MIXED_MODES], ids=["row", "mixed"])
@given(mixed=mixtures(), dtype=st.sampled_from(list(BOUNDS)))
@settings(max_examples=6, deadline=None)
def test_any_mix_and_its_gradients_equal_torch_and_autograd_in_float64(
    mixed: MixedLayers, dtype: torch.dtype, cost: CostModel
) -> None:
    found = forward_and_backward(mixed, "layer", cost, PRODUCT, dtype)
    torchs = TrainedProduct(TorchTrainedLoops())
    assert_close(found, forward_and_backward(mixed, "layer", cost, torchs, dtype), BOUNDS[dtype])
    if cost is ROW_MODE:  # which rounds nothing that autograd would not
        exact = rounded(mixed, dtype)
        wanted = forward_and_backward(exact, "layer", cost, adapted_product, torch.float64)
        assert_close(found, wanted, BOUNDS[dtype])


def test_training_on_a_gpu_computes_with_them_in_every_type_they_know() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype in BOUNDS:
        assert isinstance(choose_trained_loops(dtype, gpu), KernelTrainedLoops)
        assert not isinstance(choose_trained_loops(dtype, cpu), KernelTrainedLoops)
    assert isinstance(choose_trained_loops(torch.float64, gpu), TorchTrainedLoops)


def test_runs_of_many_parts_and_of_several_sequences_are_summed_whole() -> None:
    mixed = mixed_layers(
        seed=3,
        shapes={"layer": (16, 24)},
        adapters=[{"layer": ("flora", 1)}, {"layer": ("flora0", 2)}],
        segments=[(PART_ROWS, 0), (7, 1), (2, None), (PART_ROWS + 5, 0), (PART_ROWS, 1)],
        dtype=torch.float32,
        num_rows=10,
    )
    found = forward_and_backward(mixed, "layer", ROW_MODE, PRODUCT, torch.float32)
    exact = rounded(mixed, torch.float32)
    wanted = forward_and_backward(exact, "layer", ROW_MODE, adapted_product, torch.float64)
    assert_close(found, wanted, BOUNDS[torch.float32])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about the broken values
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_broken_adapter_reaches_no_other_token_and_no_other_row(value: float) -> None:
    mixed = mixed_layers(
        seed=5,
        shapes=SHAPES,
        adapters=[{"layer": (family, 3)} for family in ("flora+lora", "flora", "lora", "flora0")],
        segments=[(5, 1), (2, 0), (1, None), (1, 3), (1, 0), (9, 2), (2, 3), (3, 1)],
        dtype=torch.float32,
        num_rows=NUM_ROWS,
    )
    healthy = forward_and_backward(mixed, "layer", ROW_MODE, PRODUCT, torch.float32)
    broken = next(iter(mixed.adapters))
    pages = mixed.bank.pages_of(broken)["layer"]
    module = mixed.bank.modules["layer"]
    rows = (module.in_rows_NI.clone(), module.out_rows_NO.clone())
    rows[0][list(pages.mul_in)] = value
    rows[1][list(pages.mul_out)] = value
    found = forward_and_backward(mixed, "layer", ROW_MODE, PRODUCT, torch.float32, rows)

    theirs = torch.tensor([who == broken for count, who in mixed.segments for _ in range(count)])
    in_pages, out_pages = (torch.zeros(len(side), dtype=torch.bool) for side in rows)
    in_pages[list(pages.in_pages)] = out_pages[list(pages.out_pages)] = True
    for one, other, own in zip(found, healthy, (theirs, theirs, in_pages, out_pages), strict=True):
        assert torch.equal(one[~own], other[~own])
    assert not found[0][theirs].isfinite().all(), "the twin: it is broken where it is used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loops_give_an_adapter_the_same_bits_whoever_else_is_in_the_step(
    dtype: torch.dtype,
) -> None:
    """Of the loops alone: a library's product of other sizes may round otherwise."""
    both = mixed_layers(
        seed=9,
        shapes={"layer": (40, 40)},
        adapters=[{"layer": ("flora0", 4)}, {"layer": ("flora", 2)}],
        segments=[(9, 0), (PART_ROWS + 2, 1), (3, None), (1, 0), (5, 1)],
        dtype=torch.float32,
        num_rows=10,
    )
    ours = list(both.adapters)[1]
    own_T = torch.tensor([who == ours for count, who in both.segments for _ in range(count)])
    alone = replace(
        both,
        segments=[one for one in both.segments if one[1] == ours],
        x={"layer": both.x["layer"][own_T]},
    )
    pages = both.bank.pages_of(ours)["layer"]
    found = what_loops_make(both, own_T, pages, dtype)
    wanted = what_loops_make(alone, torch.ones(int(own_T.sum()), dtype=torch.bool), pages, dtype)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0


def what_loops_make(
    mixed: MixedLayers, own_T: Tensor, pages: SlotPages, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Of the own tokens and pages, with a base that hands its rows through."""
    loops, x = KernelTrainedLoops(), mixed.x["layer"].to(dtype)
    index = index_module_group(mixed.plan, mixed.bank.snapshot.table_of["layer"], ROW_MODE)
    rows = mixed.bank.modules["layer"]
    assert index.mul is not None
    is_base_T = torch.ones_like(own_T) if index.base_row_T is None else index.base_row_T >= 0
    own_M = torch.cat([own_T[is_base_T], own_T[index.mul.token_R]])
    z = loops.stack_inputs(x, rows.in_rows_NI, index)
    y_wide = loops.sum_outputs(z, rows.out_rows_NO, index, is_last=False)
    y = loops.sum_outputs(z.clone(), rows.out_rows_NO, index, is_last=True)
    z_RO = z[index.num_base_tokens :]
    h, da = loops.stack_gradients(x.flip(1), z_RO, rows.out_rows_NO, index)
    dx, db = loops.finish_gradients(x, h, rows.in_rows_NI, index)
    assert (y.dtype, dx.dtype, y_wide.dtype) == (dtype, dtype, torch.float32)
    of_tokens = (y_wide[own_T], y[own_T], dx[own_T])
    return (z[own_M], h[own_M], *of_tokens, da[list(pages.mul_out)], db[list(pages.mul_in)])


@given(
    page=st.lists(st.integers(0, 9), min_size=1, max_size=700)
    | st.lists(st.sampled_from([3, 5]), min_size=300, max_size=700)
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_in_one_part_of_its_page_in_the_order_of_the_step(page: list[int]) -> None:
    page_R, num_pages = torch.tensor(page), 10
    pages = PageRows.of(page_R, num_pages)
    first = pages.first_part_N1.tolist()
    assert first[-1] <= len(pages.begin_P)
    spans = list(zip(pages.begin_P.tolist(), pages.end_P.tolist(), strict=True))
    assert all(begin >= end for begin, end in spans[first[-1] :]), "what is behind is empty"
    for number in range(num_pages):
        found = [
            row
            for begin, end in spans[first[number] : first[number + 1]]
            for row in pages.row_R[begin:end].tolist()
        ]
        wanted = [] if number < NUM_RESERVED else (page_R == number).nonzero()[:, 0].tolist()
        assert found == wanted
        assert first[number + 1] - first[number] == -(-len(wanted) // PART_ROWS)
