"""The error of a product, measured against what the adapter itself adds: a young adapter adds less than 0.5 %.

A bound relative to the output would pass with the adapter ignored.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.row_form.mixed_layers import (
    FAMILIES,
    MIX,
    MIXED_MODES,
    MODES,
    ROW_MODE,
    SEGMENTS,
    SHAPES,
    WEIGHT_MODE,
    MixedLayers,
    mixed_layers,
)
from workers.bank.pages import NUM_RESERVED
from workers.row_form.cost import CostModel

BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def own_error(mixed: MixedLayers, path: str, y: Tensor, y0: Tensor, at_least: int = 60) -> float:
    """The largest per-token error relative to what the adapter adds, where that is 1e-3 of the output or more."""
    added = y.double() - y0.double()
    ref0 = mixed.reference(path, with_adapters=False)
    wanted = mixed.reference(path) - ref0
    counts = wanted.norm(dim=1) >= 1e-3 * ref0.norm(dim=1)
    assert counts.sum() >= at_least
    return float(
        ((added - wanted).norm(dim=1) / wanted.norm(dim=1))[counts].max() if counts.any() else 0.0
    )


def _has_offset_0(mixed: MixedLayers, path: str) -> Tensor:
    """Which tokens the base product does not enter."""
    is_without = []
    for count, version in mixed.segments:
        rows = None if version is None else mixed.adapters[version].modules.get(path)
        is_without += [rows is not None and rows.offset == 0] * count
    return torch.tensor(is_without, dtype=torch.bool)


def without_contribution(mixed: MixedLayers, path: str, cost: CostModel) -> Tensor:
    """The base output of the same step, through the same products, so that both carry the same rounding of x W0ᵀ."""
    rows = mixed.bank.modules[path]
    kept = rows.in_rows_NI.clone(), rows.out_rows_NO.clone()
    rows.in_rows_NI[NUM_RESERVED:] = 0
    rows.out_rows_NO[NUM_RESERVED:] = 0
    y0 = mixed.output(path, cost)
    rows.in_rows_NI.copy_(kept[0])
    rows.out_rows_NO.copy_(kept[1])
    # Of offset 0, nothing would be left.
    return torch.where(
        _has_offset_0(mixed, path)[:, None], mixed.reference(path, with_adapters=False), y0
    )


@pytest.mark.parametrize(
    "cost", [ROW_MODE, WEIGHT_MODE, MIXED_MODES], ids=["row", "weight", "mixed"]
)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 4e-3), (torch.float32, 1.0), (torch.bfloat16, 4e-3), (torch.bfloat16, 1.0)],
)
@pytest.mark.parametrize("path", SHAPES)
def test_error_is_small_beside_what_the_adapter_adds(
    path: str, dtype: torch.dtype, size: float, cost: CostModel
) -> None:
    mixed = mixed_layers(
        seed=1, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=dtype, size=size
    )
    y = mixed.output(path, cost)
    y0 = without_contribution(mixed, path, cost)
    assert own_error(mixed, path, y, y0) <= BOUND[dtype]
    is_base = (mixed.reference(path) == mixed.reference(path, with_adapters=False)).all(dim=1)
    assert is_base.sum() >= 6
    assert torch.equal(y[is_base], y0[is_base])


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "merged", "mixed"])
@pytest.mark.parametrize("path", SHAPES)
def test_dropping_an_adapter_or_swapping_two_is_far_outside_the_bound(
    path: str, cost: CostModel
) -> None:
    mixed = mixed_layers(
        seed=2, shapes=SHAPES, adapters=MIX, segments=SEGMENTS, dtype=torch.float32, size=1e-2
    )
    y0 = without_contribution(mixed, path, cost)
    assert own_error(mixed, path, y0, y0) > 0.5, "an ignored adapter must not pass"
    swap = list(mixed.adapters)
    swapped = MixedLayers(
        mixed.layers,
        mixed.bank,
        mixed.adapters,
        [(count, who and swap[(swap.index(who) + 2) % len(swap)]) for count, who in mixed.segments],
        mixed.x,
    )
    assert own_error(mixed, path, swapped.output(path, cost), y0) > 0.5


@st.composite
def young_and_old(draw: st.DrawFn) -> MixedLayers:
    """Any mix of families and ranks, adding from a thousandth of the base output to as much as it."""
    width = st.integers(16, 48)
    adapter = st.fixed_dictionaries(
        {path: st.tuples(st.sampled_from(FAMILIES), st.integers(1, 64)) for path in SHAPES}
    )
    adapters = draw(st.lists(adapter, min_size=1, max_size=6))
    who = st.none() | st.integers(0, len(adapters) - 1)
    return mixed_layers(
        seed=draw(st.integers(0, 2**32)),
        shapes={path: (draw(width), draw(width)) for path in SHAPES},
        adapters=adapters,
        segments=draw(st.lists(st.tuples(st.integers(0, 20), who), min_size=1, max_size=8)),
        dtype=draw(st.sampled_from(sorted(BOUND, key=str))),
        size=10 ** draw(st.floats(-2.5, 0)),
        num_rows=6 * 130,
        # A token may be all but orthogonal to a row, and then sees its last bits.
        rounded=True,
    )


@settings(max_examples=150, deadline=None)
@given(young_and_old(), st.sampled_from([ROW_MODE, WEIGHT_MODE, MIXED_MODES]))
def test_error_is_small_beside_what_any_adapter_adds_in_any_mix(
    mixed: MixedLayers, cost: CostModel
) -> None:
    for path, layer in mixed.layers.items():
        y = mixed.output(path, cost)
        y0 = without_contribution(mixed, path, cost)
        assert own_error(mixed, path, y, y0, at_least=0) <= BOUND[layer.dtype]
