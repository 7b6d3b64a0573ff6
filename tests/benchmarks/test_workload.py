"""The same seed asks for the same on both sides; skew is by the formula the result states."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.workload import Batch, Zipf, random_adapter, spread_ranks

SHAPES = {"a": (4, 6), "b": (6, 4)}


def test_zipf_shares_follow_the_formula_and_add_up() -> None:
    shares = Zipf(1000).shares()
    assert sum(shares) == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10)
    assert Zipf(4, exponent=2.0).shares()[1] / Zipf(4, exponent=2.0).shares()[3] == pytest.approx(4)


def test_the_shares_a_result_states_are_those_of_the_known_harmonic_sum() -> None:
    # H(1000) = 7.48547…, H(10) = 2.92897…
    stated = Zipf(1000).as_dict()
    assert stated["N"] == 1000
    assert stated["top_1_share"] == pytest.approx(1 / 7.48547, abs=1e-4)
    assert stated["top_10_share"] == pytest.approx(2.92897 / 7.48547, abs=1e-4)


def test_draws_repeat_for_a_seed_and_favour_the_popular() -> None:
    drawn = Zipf(100).draw(2000, seed=1)
    assert drawn == Zipf(100).draw(2000, seed=1)
    assert drawn != Zipf(100).draw(2000, seed=2)
    assert min(drawn) >= 0
    assert max(drawn) < 100
    assert Counter(drawn)[0] / 2000 == pytest.approx(Zipf(100).top_share(1), rel=0.2)


def test_every_rank_is_given_as_often_as_any_other() -> None:
    times = Counter(spread_ranks(100, 1, 16, seed=0))
    assert sorted(times) == list(range(1, 17))
    assert max(times.values()) - min(times.values()) == 1


def test_prompts_differ_between_rounds_and_requests_but_not_between_sides() -> None:
    batch = Batch(requests=3, prompt_tokens=8, vocabulary=100)
    assert batch.prompts(0) == batch.prompts(0)
    assert len({tuple(prompt) for seed in (0, 1) for prompt in batch.prompts(seed)}) == 6
    assert all(3 <= token < 100 for prompt in batch.prompts(0) for token in prompt)


def test_flora_rows_have_offset_one_and_a_b_of_their_own_in_each_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = random_adapter("flora", 2, {"a": (4, 6), "b": (4, 6)}, generator).modules
    assert all(module.offset == 1 and module.num_mul == 2 for module in rows.values())
    one, other = rows["a"].mul_b_RI, rows["b"].mul_b_RI
    assert one is not None
    assert other is not None
    assert not torch.equal(one, other)


def test_lora_rows_are_on_every_projection_in_the_type_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = random_adapter("lora", 3, SHAPES, generator, dtype=torch.bfloat16).modules
    assert rows.keys() == SHAPES.keys()
    assert all(
        module.num_add == 3 and tensor.dtype == torch.bfloat16
        for module in rows.values()
        for tensor in module.tensors().values()
    )
