from __future__ import annotations

import torch

from tests.workers.row_form.mixed_layers import WEIGHT_MODE, mixed_layers
from workers.row_form.adapted_linear import StepContext
from workers.row_form.base_linear import serving_linear
from workers.row_form.cost import ROW_MODE, training_cost
from workers.row_form.cost_measurement import measure_cost


def test_the_deterministic_mode_does_not_depend_on_a_runs_length() -> None:
    chosen = {
        ROW_MODE.prefers_weight_mode(tokens, rank, 1) or ROW_MODE.prefers_thin_product(tokens, rank)
        for tokens in (1, 16, 512, 100_000)
        for rank in (1, 8, 64)
    }
    assert chosen == {False}


def test_what_is_measured_tells_single_tokens_from_long_runs_of_high_rank() -> None:
    base = serving_linear(torch.randn(192, 128))
    cost = measure_cost(base, thin_products=True)
    assert not cost.prefers_weight_mode(num_tokens=1, num_mul=1, offset=1)
    assert cost.prefers_weight_mode(num_tokens=100_000, num_mul=64, offset=1)
    assert cost.build_rows >= 0
    assert cost.product_row > 0


def test_a_product_that_takes_add_rows_one_by_one_is_never_offered_thin_ones() -> None:
    cost = measure_cost(serving_linear(torch.randn(64, 32)), thin_products=False)
    assert not cost.prefers_thin_product(num_tokens=100_000, num_add=64)


def test_a_run_is_counted_in_the_mode_it_is_computed_in() -> None:
    cost = training_cost(torch.float32)
    assert cost.rows(4, num_mul=2, offset=1) == 12
    assert cost.rows(7, num_mul=0, offset=1) == 7
    assert cost.rows(512, num_mul=16, offset=1) < 1.1 * cost.rows(512, num_mul=1, offset=1)
    assert ROW_MODE.rows(512, num_mul=16, offset=1) == 512 * 17


def test_another_cost_holds_from_the_next_step_on_though_it_be_like_the_last() -> None:
    mixed = mixed_layers(
        seed=1,
        shapes={"layer": (8, 6)},
        adapters=[{"layer": ("flora", 2)}],
        segments=[(5, 0)],
        dtype=torch.float32,
    )
    context = StepContext(ROW_MODE)
    context.begin(mixed.plan, mixed.bank.snapshot)
    by_rows = context.index_of("layer")
    assert by_rows is not None and by_rows.mul is not None and not by_rows.mul_batches
    context.use_cost(WEIGHT_MODE)
    context.begin(mixed.plan, mixed.bank.snapshot)
    by_weights = context.index_of("layer")
    assert by_weights is not None and by_weights.mul is None and by_weights.mul_batches
