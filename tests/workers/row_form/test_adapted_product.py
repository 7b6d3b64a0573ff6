"""The row form against its float64 definition, in every mode, for any mix of adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.adapter_rows import AdapterRows
from tests.workers.row_form.mixed_layers import (
    FAMILIES,
    MIX,
    MODES,
    SHAPES,
    MixedLayers,
    mixed_layers,
)
from workers.row_form.cost import CostModel


@st.composite
def steps(draw: st.DrawFn) -> MixedLayers:
    size = st.integers(1, 40)
    shapes = {path: (draw(size), draw(size)) for path in ("first", "second", "third")}
    adapter = st.fixed_dictionaries(
        {path: st.tuples(st.sampled_from(FAMILIES), st.integers(1, 64)) for path in shapes}
    )
    adapters = draw(st.lists(adapter, max_size=5))
    who = st.none() | st.integers(0, len(adapters) - 1) if adapters else st.none()
    segments = draw(st.lists(st.tuples(st.integers(0, 9), who), min_size=1, max_size=8))
    return mixed_layers(
        seed=draw(st.integers(0, 2**32)),
        shapes=shapes,
        adapters=adapters,
        segments=segments,
        dtype=torch.float64,
        num_rows=5 * 130,
    )


@settings(max_examples=100, deadline=None)
@given(steps(), st.sampled_from(MODES))
def test_any_mix_of_families_and_ranks_equals_the_definition(
    mixed: MixedLayers, cost: CostModel
) -> None:
    for path in mixed.layers:
        torch.testing.assert_close(
            mixed.output(path, cost), mixed.reference(path), rtol=1e-9, atol=1e-9
        )
    assert mixed.bank.check_integrity()


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "merged", "mixed"])
@pytest.mark.parametrize("value", [3e38, -3e38, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "family", ["flora", "flora0", "lora", "dora", "ia3_in", "ia3_out", "lora+bias", "own_bias"]
)
def test_a_broken_neighbour_leaves_the_healthy_ones_bits_alone(
    family: str, value: float, cost: CostModel
) -> None:
    mixed = mixed_layers(
        seed=3,
        shapes=SHAPES,
        adapters=[{path: (family, 3) for path in SHAPES}, *MIX],
        segments=[(4, 0), (4, 1), (3, None), (4, 3), (20, 0), (20, 2), (1, 4)],
        dtype=torch.float32,
    )
    healthy = torch.ones(56, dtype=torch.bool)
    healthy[:4] = healthy[15:35] = False
    broken = next(iter(mixed.adapters))
    for path in SHAPES:
        before = mixed.output(path, cost)
        rows, place = mixed.bank.modules[path], mixed.bank.pages_of(broken)[path]
        rows.in_rows_NI[list(place.in_pages)] = value
        rows.out_rows_NO[list(place.out_pages)] = value
        after = mixed.output(path, cost)
        assert not torch.equal(before[~healthy], after[~healthy])
        assert torch.equal(before[healthy], after[healthy])


@pytest.mark.parametrize("cost", MODES, ids=["row", "weight", "merged", "mixed"])
def test_gradients_equal_those_of_the_materialised_weights(cost: CostModel) -> None:
    mixed = mixed_layers(
        seed=4,
        shapes={"first": (12, 10)},
        adapters=[{"first": ("flora", 3)}, {"first": ("flora0", 2)}, {"first": ("lora", 4)}],
        segments=[(5, 0), (2, None), (6, 1), (7, 2), (3, 0)],
        dtype=torch.float64,
    )
    rows = mixed.bank.modules["first"]
    leaves = (
        mixed.x["first"].requires_grad_(),
        rows.in_rows_NI.requires_grad_(),
        rows.out_rows_NO.requires_grad_(),
    )
    pull = torch.randn(23, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((mixed.output("first", cost) * pull).sum(), leaves)

    adapters = {}
    for version in mixed.adapters:
        place = mixed.bank.pages_of(version)["first"]
        ins, outs = rows.in_rows_NI, rows.out_rows_NO
        old = mixed.adapters[version].modules["first"]
        adapters[version] = AdapterRows({
            "first": type(old)(
                mul_a_RO=outs[list(place.mul_out)] if old.num_mul else None,
                mul_b_RI=ins[list(place.mul_in)] if old.num_mul else None,
                add_q_EO=outs[list(place.add_out)] if old.num_add else None,
                add_p_EI=ins[list(place.add_in)] if old.num_add else None,
                add_gate=old.add_gate,
                offset=old.offset,
            )
        })  # fmt: skip
    twin = MixedLayers(mixed.layers, mixed.bank, adapters, mixed.segments, mixed.x)
    wanted = torch.autograd.grad((twin.reference("first") * pull).sum(), leaves)
    for ours, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_mode_follows_cost_long_runs_of_many_rows_are_worth_a_weight() -> None:
    cost = CostModel(build_rows=50, build_rows_per_rank=0.5)
    assert cost.prefers_weight_mode(num_tokens=100, num_mul=8, offset=1)
    assert not cost.prefers_weight_mode(num_tokens=1, num_mul=8, offset=1)
    assert not cost.prefers_weight_mode(num_tokens=10_000, num_mul=1, offset=1)
    assert not cost.prefers_weight_mode(num_tokens=10_000, num_mul=0, offset=1)
