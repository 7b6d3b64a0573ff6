"""Sampling: the right distribution, the same token in whatever batch, and one bad row spoils no other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.engine.request import SamplingParams
from workers.engine.sampler import USUAL_WIDTH, SamplingRow, sample, uniform

VOCABULARY = 50


def row(position: int = 0, forbidden: frozenset[int] = frozenset(), **params: float) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), position, forbidden)  # type: ignore[arg-type]


def random_logits(seed: int, rows: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Rounded to bfloat16, as real logits are: many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    return logits.bfloat16().float()


def kept(logits_V: Tensor, top_k: int, top_p: float, temperature: float) -> set[int]:
    """Top-k and then top-p, written out with a sort; tokens tied with the last kept one are kept."""
    probability = torch.softmax(logits_V.double() / temperature, 0)
    order = sorted(range(len(logits_V)), key=lambda token: -float(probability[token]))
    order = order[: top_k or len(order)]
    total = float(probability[order].sum())
    chosen: list[int] = []
    mass = 0.0
    for token in order:
        if mass >= top_p * total - 1e-9 and chosen:
            break
        chosen.append(token)
        mass += float(probability[token])
    least = float(logits_V[chosen[-1]])
    return {token for token in range(len(logits_V)) if float(logits_V[token]) >= least}


random_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20, 80]),
    seed=st.integers(-5, 2**63),
)


@settings(deadline=None)
@given(st.lists(st.tuples(random_params, st.integers(0, 500)), min_size=1, max_size=6))
def test_a_row_gets_the_same_token_alone_and_in_any_batch(
    wanted: list[tuple[SamplingParams, int]],
) -> None:
    logits = random_logits(0, len(wanted))
    rows = [SamplingRow(params, position) for params, position in wanted]
    alone = [sample(logits[i : i + 1].clone(), [one])[0] for i, one in enumerate(rows)]
    assert sample(logits.clone(), rows) == alone
    back = sample(logits.flip(0).clone(), rows[::-1])
    assert back[::-1] == alone


@settings(deadline=None)
@given(random_params, st.integers(0, 1000))
def test_only_tokens_that_top_k_and_top_p_keep_are_drawn(
    params: SamplingParams, position: int
) -> None:
    logits = random_logits(position % 7, 1)
    (token,) = sample(logits.clone(), [SamplingRow(params, position)])
    if params.is_greedy:
        assert token == int(logits[0].argmax())
    else:
        assert token in kept(logits[0], params.top_k, params.top_p, params.temperature)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8)]
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(1, 1, vocabulary=12)
    draws = 4000
    rows = [
        row(position, temperature=temperature, top_k=top_k, top_p=top_p, seed=9)
        for position in range(draws)
    ]
    drawn = sample(logits.repeat(draws, 1), rows)
    expected = torch.softmax(logits[0].double() / temperature, 0)
    allowed = torch.zeros(12, dtype=torch.float64)
    allowed[sorted(kept(logits[0], top_k, top_p, temperature))] = 1
    expected = expected * allowed / (expected * allowed).sum()
    for token, share in enumerate(expected.tolist()):
        # Five standard deviations: the seed is fixed, so this holds always or never.
        margin = 5 * math.sqrt(share * (1 - share) / draws)
        assert abs(drawn.count(token) / draws - share) <= margin


def test_top_p_that_keeps_more_than_the_usual_width_is_exact() -> None:
    vocabulary = 3 * USUAL_WIDTH
    flat = torch.zeros(1, vocabulary)
    flat[0, 0] = 1.0
    rows = [row(position, top_p=0.9, seed=1) for position in range(300)]
    drawn = sample(flat.repeat(300, 1), rows)
    assert max(token for token in drawn if token is not None) > USUAL_WIDTH


def test_seed_and_position_alone_choose_the_random_number() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.05
    assert uniform(7, 3) == uniform(7, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_told_and_spoils_no_other(
    bad: float, temperature: float
) -> None:
    logits = random_logits(2, 3)
    rows = [row(temperature=temperature, top_p=0.9, seed=seed) for seed in range(3)]
    healthy = sample(logits.clone(), rows)
    logits[1, 17] = bad
    assert sample(logits, rows) == [healthy[0], None, healthy[2]]


def test_forbidden_tokens_are_never_chosen_but_do_not_make_a_row_bad() -> None:
    logits = random_logits(3, 2)
    best = frozenset(logits[0].topk(3).indices.tolist())
    rows = [row(forbidden=best, temperature=0.0), row(forbidden=best, temperature=2.0)]
    tokens = sample(logits, rows)
    assert None not in tokens
    assert not best & set(tokens)


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []
