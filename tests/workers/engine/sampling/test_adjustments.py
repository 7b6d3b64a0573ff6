"""Bias and penalties, held to transformers' own processors and to OpenAI's formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from storage.errors import InvalidRequestError
from workers.engine.request import SamplingParams
from workers.engine.sampling.adjustments import adjust
from workers.engine.sampling.drawing import weights
from workers.engine.sampling.row import SamplingRow

VOCABULARY = 60
token_lists = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)


def adjusted(logits: torch.Tensor, *rows: SamplingRow) -> torch.Tensor:
    changed = logits.clone()
    adjust(changed, rows)
    return changed


@given(st.integers(0, 1000), token_lists, token_lists, st.sampled_from([0.3, 0.9, 1.1, 2.0]))
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(
    seed: int, prompt: list[int], answer: list[int], penalty: float
) -> None:
    logits = random_logits(seed)
    row = SamplingRow(SamplingParams(repetition_penalty=penalty), 0, prompt=prompt, answer=answer)
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    expected = oracle(torch.tensor([prompt + answer]), logits.clone())
    torch.testing.assert_close(adjusted(logits, row), expected)
    # The twin: without the prompt it would be another answer.
    if set(prompt) - set(answer):
        alone = SamplingRow(row.params, 0, answer=answer)
        assert not torch.allclose(adjusted(logits, alone), expected)


@given(st.integers(0, 1000), token_lists, token_lists)
def test_frequency_and_presence_penalties_count_the_answer_only(
    seed: int, prompt: list[int], answer: list[int]
) -> None:
    logits = random_logits(seed)
    params = SamplingParams(frequency_penalty=0.7, presence_penalty=-0.4)
    expected = logits.clone()
    for token, count in Counter(answer).items():
        expected[0, token] -= 0.7 * count - 0.4
    changed = adjusted(logits, SamplingRow(params, 0, prompt=prompt, answer=answer))
    torch.testing.assert_close(changed, expected)


def test_the_order_is_bias_repetition_frequency_and_presence_then_forbidden() -> None:
    logits = random_logits(3)
    logits[0, :3] = torch.tensor([-1.0, 5.0, 2.0])
    params = SamplingParams(
        logit_bias=((0, 3.0), (2, 100.0)),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    row = SamplingRow(params, 0, frozenset({2}), prompt=[1], answer=[0, 0, 2])
    changed = adjusted(logits, row)
    # -1 + 3 is positive, so it is halved; had the bias come last, it would be doubled first.
    assert changed[0, :3].tolist() == [(-1 + 3) / 2 - 2 * 0.5 - 0.25, 5 / 2, -torch.inf]
    assert torch.equal(changed[0, 3:], logits[0, 3:])


def test_rows_that_ask_for_nothing_are_not_touched() -> None:
    logits = random_logits(4, rows=3)
    busy = SamplingRow(
        SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, logit_bias=((5, 1.0),)),
        0,
        frozenset({7}),
        prompt=[1, 2],
        answer=[3],
    )
    idle = SamplingRow(SamplingParams(), 0, prompt=[1, 2], answer=[3])
    changed = adjusted(logits, idle, busy, idle)
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])
    assert (changed[1] != logits[1]).nonzero()[:, 0].tolist() == [1, 2, 3, 5, 7]


def test_a_penalty_never_makes_a_logit_infinite() -> None:
    logits = torch.full((1, VOCABULARY), 3e38)
    logits[0, 1] = -3e38
    params = SamplingParams(repetition_penalty=0.01)
    assert torch.isfinite(adjusted(logits, SamplingRow(params, 0, prompt=[0, 1]))).all()
    params = SamplingParams(repetition_penalty=100.0)
    assert torch.isfinite(adjusted(logits, SamplingRow(params, 0, prompt=[0, 1]))).all()


@given(
    st.integers(0, 1000),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([0, 1, 7, 30]),
    st.sampled_from([0.2, 0.9, 1.0]),
)
def test_temperature_min_p_top_k_and_top_p_are_those_of_transformers_in_this_order(
    seed: int, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    expected = logits.clone()
    oracles: list[Any] = [TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p)]
    oracles += [TopKLogitsWarper(top_k)] if top_k else []
    oracles += [TopPLogitsWarper(top_p)]
    for oracle in oracles:
        expected = oracle(None, expected)
    weight = weights(logits, [SamplingRow(params, 0)])
    torch.testing.assert_close(weight / weight.sum(), expected.softmax(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("max_tokens", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_choices_differ_in_their_seed_only_and_the_first_has_the_requests_own() -> None:
    params = SamplingParams(seed=7, temperature=0.5)
    choices = [params.of_choice(index) for index in range(16)]
    assert choices[0] == params
    assert len({one.seed for one in choices}) == 16
    assert {(one.temperature, one.max_tokens) for one in choices} == {(0.5, 16)}
    assert choices[3] == SamplingParams(seed=7, temperature=0.5).of_choice(3)
    # Neighbouring seeds share no choice.
    assert not {one.seed for one in choices} & {
        SamplingParams(seed=8).of_choice(index).seed for index in range(16)
    }
