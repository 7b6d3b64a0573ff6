"""Log-probabilities are the model's own, whatever the request does to them afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.request import SamplingParams, TokenLogprobs
from workers.engine.sampling.logprobs import BLOCK_ROWS, token_logprobs
from workers.engine.sampling.row import SampledToken, SamplingRow
from workers.engine.sampling.sampler import sample

VOCABULARY = 40


def random_logits(seed: int, rows: int) -> torch.Tensor:
    """Rounded to bfloat16, as real logits are: many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator).bfloat16().float()


def expected(logits_V: torch.Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Written out with a softmax and a stable sort."""
    logprobs = logits_V.double().log_softmax(0).tolist()
    order = sorted(range(VOCABULARY), key=lambda one: (-float(logits_V[one]), one))
    return TokenLogprobs(logprobs[token], tuple((one, logprobs[one]) for one in order[:num_top]))


def close(one: TokenLogprobs | None, other: TokenLogprobs) -> bool:
    assert one is not None
    numbers = [one.logprob, *(value for _, value in one.top)]
    others = [other.logprob, *(value for _, value in other.top)]
    return [each for each, _ in one.top] == [each for each, _ in other.top] and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) for a, b in zip(numbers, others, strict=True)
    )


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.integers(0, 20)), min_size=1, max_size=6),
)
def test_they_are_a_log_softmax_in_any_batch(seed: int, asked: list[tuple[int, int]]) -> None:
    logits = random_logits(seed, len(asked))
    tokens, num_top = zip(*asked, strict=True)
    together = token_logprobs(logits, tokens, num_top)
    for i, (token, count) in enumerate(asked):
        assert close(together[i], expected(logits[i], token, count))
        assert token_logprobs(logits[i : i + 1], [token], [count]) == [together[i]]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bias_penalties_and_temperature_do_not_change_them(temperature: float) -> None:
    logits = random_logits(1, 3)
    best = logits.argmax(dim=1).tolist()
    params = SamplingParams(
        temperature=temperature,
        logprobs=3,
        repetition_penalty=1.7,
        presence_penalty=1.0,
        logit_bias=((best[1], -100.0),),
    )
    rows = [
        SamplingRow(SamplingParams(temperature=0.0), 0),
        SamplingRow(params, 0, prompt=best, answer=best),
        SamplingRow(SamplingParams(temperature=0.0, logprobs=0), 0),
    ]
    plain, changed, chosen_only = sample(logits.clone(), rows)
    assert plain == SampledToken(best[0])
    assert changed is not None and changed.token != best[1]
    assert close(changed.logprobs, expected(logits[1], changed.token, 3))
    assert chosen_only is not None and chosen_only.token == best[2]
    assert close(chosen_only.logprobs, expected(logits[2], best[2], 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_none(bad: float) -> None:
    logits = random_logits(2, 2)
    logits[0, 3] = bad
    first, second = token_logprobs(logits, [5, 5], [2, 2])
    assert first is None
    assert close(second, expected(logits[1], 5, 2))
    row = SamplingRow(SamplingParams(logprobs=1), 0)
    assert sample(logits, [row, row])[0] is None


def test_more_rows_than_a_block_are_all_told() -> None:
    count = 2 * BLOCK_ROWS + 3
    logits = random_logits(5, count)
    tokens = [row % VOCABULARY for row in range(count)]
    scores = token_logprobs(logits, tokens, [row % 3 for row in range(count)])
    assert len(scores) == count
    for row, one in enumerate(scores):
        assert close(one, expected(logits[row], tokens[row], row % 3))


def test_no_rows_have_none() -> None:
    assert token_logprobs(torch.empty(0, VOCABULARY), [], []) == []
