"""Sampling: the right distribution, the same token in whatever batch, and one bad row spoils no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.engine.request import SamplingParams
from workers.engine.sampling.drawing import WIDTHS, uniform, weights
from workers.engine.sampling.row import SamplingRow
from workers.engine.sampling.sampler import sample

VOCABULARY = 50


def row(position: int = 0, forbidden: frozenset[int] = frozenset(), **params: float) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), position, forbidden)  # type: ignore[arg-type]


def random_logits(seed: int, rows: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Rounded to bfloat16, as real logits are: many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    return logits.bfloat16().float()


def kept(logits_V: Tensor, params: SamplingParams) -> set[int]:
    """Min-p, top-k and then top-p, written out with a sort; tokens tied with the last kept one are kept."""
    probability = torch.softmax(logits_V.double() / params.temperature, 0)
    order = sorted(range(len(logits_V)), key=lambda token: -float(probability[token]))
    order = [one for one in order if probability[one] >= params.min_p * probability[order[0]]]
    order = order[: params.top_k or len(order)]
    total = float(probability[order].sum())
    chosen: list[int] = []
    mass = 0.0
    for token in order:
        if mass >= params.top_p * total - 1e-9 and chosen:
            break
        chosen.append(token)
        mass += float(probability[token])
    least = float(logits_V[chosen[-1]])
    return {token for token in range(len(logits_V)) if float(logits_V[token]) >= least}


def tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    return [None if one is None else one.token for one in sample(logits, rows)]


drawing_params = {
    "temperature": st.sampled_from([0.0, 1e-9, 0.01, 0.7, 1.0, 2.0]),
    "top_p": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    "top_k": st.sampled_from([0, 1, 3, 20, 80]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "seed": st.integers(-5, 2**63),
}
random_params = st.builds(SamplingParams, **drawing_params)
token_ids = st.integers(0, VOCABULARY - 1)
random_rows = st.builds(
    SamplingRow,
    params=st.builds(
        SamplingParams,
        **drawing_params,
        presence_penalty=st.sampled_from([0.0, 0.0, -2.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.0, -0.3, 2.0]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 0.01, 1.3, 100.0]),
        logit_bias=st.dictionaries(
            token_ids, st.sampled_from([-100.0, 2.5, 100.0]), max_size=3
        ).map(lambda bias: tuple(bias.items())),
        logprobs=st.sampled_from([None, None, 0, 1, 5, 20]),
    ),
    position=st.integers(0, 500),
    forbidden=st.frozensets(token_ids, max_size=3),
    prompt=st.lists(token_ids, max_size=20),
    answer=st.lists(token_ids, max_size=20),
)


@settings(deadline=None)
@given(st.lists(random_rows, min_size=1, max_size=6))
def test_a_row_gets_the_same_token_alone_and_in_any_batch(
    rows: list[SamplingRow],
) -> None:
    logits = random_logits(0, len(rows))
    alone = [sample(logits[i : i + 1].clone(), [one])[0] for i, one in enumerate(rows)]
    assert sample(logits.clone(), rows) == alone
    back = sample(logits.flip(0), rows[::-1])
    assert back[::-1] == alone


@settings(deadline=None)
@given(random_params, st.integers(0, 1000))
def test_only_tokens_that_top_k_and_top_p_keep_are_drawn(
    params: SamplingParams, position: int
) -> None:
    logits = random_logits(position % 7, 1)
    (token,) = tokens(logits.clone(), [SamplingRow(params, position)])
    if params.is_greedy:
        assert token == int(logits[0].argmax())
    else:
        assert token in kept(logits[0], params)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"min_p": 0.02, "top_k": 6, "top_p": 0.9, "temperature": 1.5},
    ],
)
def test_tokens_come_as_often_as_they_should(params: dict[str, float]) -> None:
    logits = random_logits(1, 1, vocabulary=12)
    draws = 4000
    rows = [row(position, **params, seed=9) for position in range(draws)]
    drawn = tokens(logits.repeat(draws, 1), rows)
    expected = torch.softmax(logits[0].double() / params.get("temperature", 1.0), 0)
    allowed = torch.zeros(12, dtype=torch.float64)
    allowed[sorted(kept(logits[0], rows[0].params))] = 1
    expected = expected * allowed / (expected * allowed).sum()
    for token, share in enumerate(expected.tolist()):
        # Five standard deviations: the seed is fixed, so this holds always or never.
        margin = 5 * math.sqrt(share * (1 - share) / draws)
        assert abs(drawn.count(token) / draws - share) <= margin


@pytest.mark.parametrize("width", WIDTHS)
def test_top_p_is_exact_however_many_tokens_it_keeps(width: int) -> None:
    """A nearly flat row beside one that keeps a single token: 0.9 of 3 widths is more than two of them."""
    vocabulary = 3 * width
    logits = torch.zeros(300, vocabulary)
    logits[:, 0] = 1.0
    logits[0, 5] = 50.0
    rows = [row(position, top_p=0.9, seed=1) for position in range(300)]
    first, *drawn = tokens(logits, rows)
    assert first == 5
    assert max(token for token in drawn if token is not None) > 2 * width
    least = weights(logits, rows)
    # All the others are tied, so all of them are kept.
    assert torch.equal((least > 0).sum(dim=1), torch.tensor([1] + [vocabulary] * 299))


@given(st.integers(0, 100), st.sampled_from([0.2, 0.9, 0.99]), st.sampled_from([0, 50, 3000]))
def test_wider_looks_keep_what_a_sort_keeps(seed: int, top_p: float, top_k: int) -> None:
    """Rows that need looks of different widths, in one batch."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 5.0])[:, None]
    logits = scale * torch.randn(3, 9000, generator=generator, dtype=torch.float64)
    params = SamplingParams(top_p=top_p, top_k=top_k)
    weight = weights(logits, [SamplingRow(params, 0)] * 3)
    for index in range(3):
        sorted_V, order_V = logits[index].sort(descending=True)
        probability_V = sorted_V[: top_k or None].softmax(0)
        before_V = probability_V.cumsum(0) - probability_V
        assert set(order_V[: len(before_V)][before_V < top_p].tolist()) == set(
            weight[index].nonzero()[:, 0].tolist()
        )


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
    healthy = tokens(logits.clone(), rows)
    logits[1, 17] = bad
    assert tokens(logits, rows) == [healthy[0], None, healthy[2]]


def test_forbidden_tokens_are_never_chosen_but_do_not_make_a_row_bad() -> None:
    logits = random_logits(3, 2)
    best = frozenset(logits[0].topk(3).indices.tolist())
    rows = [row(forbidden=best, temperature=0.0), row(forbidden=best, temperature=2.0)]
    chosen = tokens(logits, rows)
    assert None not in chosen
    assert not best & set(chosen)


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []
