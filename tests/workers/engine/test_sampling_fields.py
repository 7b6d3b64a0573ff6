"""Every sampling field, through a whole engine: held to transformers, and the same in any batch and any chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.errors import AdapterRefusedError, InvalidRequestError
from storage.identity import AdapterSet
from tests.workers.engine.small_engine import (
    Answer,
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from workers.engine.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()


def own_logprobs(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' log-probabilities of the next token, after each token."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(1)


def agrees(one: TokenLogprobs, expected: torch.Tensor, token: int, num_top: int) -> bool:
    values, ids = expected.topk(num_top)
    return (
        math.isclose(one.logprob, float(expected[token]), rel_tol=1e-9)
        and [each for each, _ in one.top] == ids.tolist()
        and all(
            math.isclose(mine, float(other), rel_tol=1e-9)
            for (_, mine), other in zip(one.top, values, strict=True)
        )
    )


def prompt_scores(answer: Answer) -> tuple[TokenLogprobs, ...]:
    """They come with the first output, and with no other."""
    assert [one.prompt_logprobs for one in answer.outputs[1:]] == [None] * (len(answer.outputs) - 1)
    scores = answer.outputs[0].prompt_logprobs
    assert scores is not None
    return scores


@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
def test_greedy_answers_with_a_repetition_penalty_are_those_of_transformers_generate(
    tiny_llama_dir: Path, model: torch.nn.Module, penalty: float
) -> None:
    requests = [
        greedy(f"r{i}", prompt(i, 2 + 3 * i), max_tokens=20, repetition_penalty=penalty)
        for i in range(6)
    ]
    plain = [greedy(f"p{i}", prompt(i, 2 + 3 * i), max_tokens=20) for i in range(6)]
    answers = run(small_engine(tiny_llama_dir), [*requests, *plain])
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        made = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answers[request.request_id].tokens == made[0, ids.shape[1] :].tolist()
    # The twin: the penalty changes answers.
    assert any(answers[f"r{i}"].tokens != answers[f"p{i}"].tokens for i in range(6))


def test_bias_and_penalties_do_what_their_names_say(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir)
    tokens = prompt(1, 5)
    plain = run(engine, [greedy("r", tokens)])["r"].tokens
    only = run(engine, [greedy("r", tokens, logit_bias=((44, 100.0),))])["r"].tokens
    assert only == [44] * 12
    never = run(engine, [greedy("r", tokens, logit_bias=((plain[0], -100.0),))])["r"].tokens
    assert plain[0] not in never
    strong = {"frequency_penalty": 2.0, "presence_penalty": 2.0, "logit_bias": ((44, 6.0),)}
    varied = run(engine, [greedy("r", tokens, **strong)])["r"].tokens
    stuck = run(engine, [greedy("r", tokens, logit_bias=((44, 6.0),))])["r"].tokens
    assert len(set(varied)) > len(set(stuck))


@pytest.mark.parametrize("runner", ["hf", "native"])
@pytest.mark.parametrize("max_step_tokens", [48, 12])
def test_logprobs_of_prompt_and_answer_are_those_of_transformers_however_the_prompt_is_cut(
    tiny_llama_dir: Path, model: torch.nn.Module, max_step_tokens: int, runner: str
) -> None:
    requests = [
        greedy(f"r{i}", prompt(i, length), max_tokens=4, logprobs=i, prompt_logprobs=i)
        for i, length in enumerate((1, 2, 17, 40))
    ]
    requests.append(greedy("silent", prompt(9, 20), max_tokens=4))
    engine = small_engine(tiny_llama_dir, max_step_tokens=max_step_tokens, runner=runner)
    answers = run(engine, requests)
    for number, request in enumerate(requests[:-1]):
        answer = answers[request.request_id]
        tokens = [*request.prompt_token_ids, *answer.tokens]
        scores = prompt_scores(answer)
        assert len(scores) == len(request.prompt_token_ids) - 1
        scores += tuple(one for output in answer.outputs for one in output.new_logprobs)
        expected = own_logprobs(model, tokens)
        assert len(scores) == len(tokens) - 1
        assert all(
            agrees(score, expected[at], tokens[at + 1], number) for at, score in enumerate(scores)
        )
    assert answers["silent"].outputs[0].prompt_logprobs is None
    assert all(output.new_logprobs == () for output in answers["silent"].outputs)


def test_a_prompt_is_scored_by_the_adapter_that_is_asked_for(tiny_llama_dir: Path) -> None:
    shapes = projections(tiny_llama_dir)
    adapters = {version(i): random_adapter(shapes, "flora", 2, seed=i) for i in range(2)}
    engine = small_engine(tiny_llama_dir, adapters)
    requests = [
        replace(
            greedy(f"r{i}", prompt(0, 9), max_tokens=0, prompt_logprobs=0),
            adapters=AdapterSet.of(user),
        )
        for i, user in enumerate([None, *adapters])
    ]
    together = run(engine, requests)
    alone = {name: one for request in requests for name, one in run(engine, [request]).items()}
    values = {
        name: [round(score.logprob, 9) for score in prompt_scores(one)]
        for name, one in together.items()
    }
    for name, one in alone.items():
        assert values[name] == [round(score.logprob, 9) for score in prompt_scores(one)]
    assert len({tuple(each) for each in values.values()}) == 3


def test_no_tokens_are_answered_when_none_are_asked_for(tiny_llama_dir: Path) -> None:
    engine = small_engine(tiny_llama_dir, max_step_tokens=12)
    answer = run(engine, [greedy("r", prompt(0, 30), max_tokens=0, prompt_logprobs=1)])["r"]
    assert (answer.tokens, answer.reason) == ([], FinishReason.LENGTH)
    assert len(prompt_scores(answer)) == 29
    assert engine.load().tokens_out == 0
    assert engine.check_integrity()


def test_a_prompt_whose_scores_are_not_finite_is_an_error(tiny_llama_dir: Path) -> None:
    shapes = projections(tiny_llama_dir)
    adapters = {version(1): random_adapter(shapes, "flora", 2, seed=1, size=3e38)}
    engine = small_engine(tiny_llama_dir, adapters, dtype="float32", max_step_tokens=12)
    bad = replace(
        greedy("bad", prompt(0, 30), max_tokens=0, prompt_logprobs=1),
        adapters=AdapterSet.of(version(1)),
    )
    good = greedy("good", prompt(0, 30), max_tokens=2, prompt_logprobs=1)
    answers = run(engine, [bad, good])
    assert isinstance(answers["bad"].error, AdapterRefusedError)
    assert len(prompt_scores(answers["good"])) == 29


def every_field(max_tokens: int) -> list[EngineRequest]:
    """Two drawn choices for each of several mixtures of fields."""
    fields: list[dict[str, object]] = [
        {"min_p": 0.05},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"repetition_penalty": 1.4, "logprobs": 3},
        {"logit_bias": ((50, 4.0), (51, -100.0)), "top_p": 0.9},
        {"top_k": 20, "stop_token_ids": frozenset({60}), "min_tokens": 5},
        {"prompt_logprobs": 2, "logprobs": 0},
        {},
    ]
    return [
        EngineRequest(
            f"r{i}-{choice}",
            prompt(i, 6 + i),
            SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True, **one).of_choice(choice),  # type: ignore[arg-type]
        )
        for i, one in enumerate(fields)
        for choice in range(2)
    ]


def told(answer: Answer) -> tuple[list[int], list[float], list[float]]:
    """All that an answer says: its tokens, their log-probabilities, and its prompt's."""
    scores = answer.outputs[0].prompt_logprobs or ()
    new = [one for output in answer.outputs for one in output.new_logprobs]
    return (
        answer.tokens,
        [round(one.logprob, 9) for one in new],
        [round(one.logprob, 9) for one in scores],
    )


def test_drawn_answers_with_every_field_are_the_same_alone_and_in_any_batch(
    tiny_llama_dir: Path,
) -> None:
    engine = small_engine(tiny_llama_dir)
    requests = every_field(max_tokens=10)
    alone = {name: one for request in requests for name, one in run(engine, [request]).items()}
    together = run(engine, reversed(requests))
    assert {name: told(one) for name, one in together.items()} == {
        name: told(one) for name, one in alone.items()
    }
    assert alone["r6-0"].tokens != alone["r6-1"].tokens


def test_a_preempted_request_goes_on_as_if_nothing_had_happened(tiny_llama_dir: Path) -> None:
    requests = every_field(max_tokens=24)
    roomy = run(small_engine(tiny_llama_dir), requests)
    engine = small_engine(tiny_llama_dir, kv_tokens=128, kv_block_tokens=4, max_step_tokens=16)
    tight = run(engine, requests)
    assert engine.load().preemptions > 0
    assert {name: told(one) for name, one in tight.items()} == {
        name: told(one) for name, one in roomy.items()
    }
    assert len(told(tight["r5-0"])[2]) == len(requests[10].prompt_token_ids) - 1
    assert engine.check_integrity()


def test_a_prompt_that_lies_in_the_prefix_cache_is_scored_all_the_same(
    tiny_llama_dir: Path,
) -> None:
    engine = small_engine(tiny_llama_dir, kv_block_tokens=4)
    plain = greedy("plain", prompt(0, 30))
    scoring = greedy("scoring", prompt(0, 30), prompt_logprobs=1, logprobs=0)
    first = run(engine, [scoring])["scoring"]
    assert run(engine, [plain])["plain"].outputs[0].num_cached_tokens
    again = run(engine, [scoring])["scoring"]
    assert told(again) == told(first)
    assert len(prompt_scores(again)) == 29


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": ((100_000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"stop_token_ids": frozenset(range(300)), "min_tokens": 1}, "stop_token_ids"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    tiny_llama_dir: Path, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        small_engine(tiny_llama_dir).submit(greedy("r", (5, 6), **fields))  # type: ignore[arg-type]
    assert caught.value.param == param
