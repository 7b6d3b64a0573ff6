"""Every sampling field over real HTTP, in OpenAI's shapes, whole and streamed, with the stock client. No Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from storage.errors import OverloadedError
from tests.deployments.conftest import LocalServer
from tests.deployments.test_http_api import until
from tests.deployments.world import BASE_ID

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "a few words"}]


@pytest.fixture(scope="module")
def server(local_server: LocalServer) -> LocalServer:
    local_server.world.publish("sampler", rank=2, seed=71)
    return local_server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return server.openai


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()


def own_logprobs(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' log-probabilities of the next token, after each token."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(1)


def complete(server: LocalServer, **fields: Any) -> httpx.Response:
    body = {"model": BASE_ID, "prompt": "the", "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def text_of(server: LocalServer, **fields: Any) -> str:
    response = complete(server, ignore_eos=True, **fields)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def follows_its_own_types(answer: BaseModel) -> bool:
    """The client builds its answers without checking them; here they are checked."""
    return type(answer).model_validate(answer.model_dump(exclude_unset=True)) == answer


# Fields that change which tokens are chosen.


def test_a_bias_can_force_and_forbid_a_token(server: LocalServer) -> None:
    (token,) = server.codec.encode("q")
    assert text_of(server, logit_bias={str(token): 100}) == "q" * 8
    first = server.codec.encode("the")
    plain = server.alone.answer(first, None, 8)
    forbidden = {str(each): -100 for each in plain}
    answer = complete(server, ignore_eos=True, logit_bias=forbidden, logprobs=0).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 8
    assert not {server.codec.tokens.name(each) for each in plain} & set(
        answer["choices"][0]["logprobs"]["tokens"]
    )


def test_penalties_change_an_answer_and_their_neutral_values_do_not(server: LocalServer) -> None:
    plain = text_of(server, max_tokens=40)
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0}
    assert text_of(server, max_tokens=40, **neutral, logit_bias={}, n=1) == plain
    varied = text_of(server, max_tokens=40, repetition_penalty=5.0)
    repetitive = text_of(server, max_tokens=40, frequency_penalty=-2.0)
    assert len(set(repetitive)) < len(set(plain)) < len(set(varied))


def test_min_p_of_one_leaves_nothing_to_draw(server: LocalServer) -> None:
    plain = text_of(server)
    assert text_of(server, temperature=2.0, min_p=1.0, seed=5) == plain
    assert text_of(server, temperature=2.0, seed=5) != plain


def test_a_seeded_answer_is_the_same_whoever_is_in_the_batch(server: LocalServer) -> None:
    fields = {"temperature": 1.2, "seed": 11, "max_tokens": 12, "min_p": 0.02}
    alone = text_of(server, **fields)
    crowd = complete(server, ignore_eos=True, **fields, prompt=["user", "the", "dog", "the"])
    assert [each["text"] == alone for each in crowd.json()["choices"]][1::2] == [True, True]


def test_prompts_without_a_seed_are_drawn_independently(server: LocalServer) -> None:
    fields = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    choices = complete(server, prompt=["the"] * 4, **fields).json()["choices"]
    assert len({each["text"] for each in choices}) == 4


# Several answers.


def test_n_answers_are_indexed_and_their_prompt_is_counted_once(server: LocalServer) -> None:
    fields = {"temperature": 1.2, "seed": 4, "max_tokens": 6, "ignore_eos": True}
    one = complete(server, prompt=["the", "a few"], **fields).json()
    many = complete(server, prompt=["the", "a few"], n=3, **fields).json()
    assert [each["index"] for each in many["choices"]] == list(range(6))
    texts = [each["text"] for each in many["choices"]]
    # The first answer to each prompt is the one that n = 1 gives.
    assert [texts[0], texts[3]] == [each["text"] for each in one["choices"]]
    assert len(set(texts)) == 6
    assert many["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert many["usage"]["completion_tokens"] == 6 * 6
    assert (
        complete(server, prompt=["the", "a few"], n=3, **fields).json()["choices"]
        == (many["choices"])
    )


def test_streamed_answers_come_interleaved_with_their_index(
    server: LocalServer, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {
        "model": "sampler",
        "messages": MESSAGES,
        "n": 3,
        "seed": 9,
        "temperature": 1.1,
        "max_tokens": 10,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index, expected in enumerate(whole.choices):
        mine = [choice for choice in choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == expected.message.content
        assert [one.finish_reason for one in mine if one.finish_reason] == ["length"]
    order = [choice.index for choice in choices]
    assert order != sorted(order), "one answer after the other"
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None and whole.usage.completion_tokens == 30


def test_a_client_that_goes_away_ends_all_its_answers(server: LocalServer) -> None:
    load = server.gateway.client.load
    body = {"model": BASE_ID, "prompt": "a", "n": 4, "max_tokens": 400, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    before = load().tokens_out
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        next(response.iter_lines())
    until(lambda: load().num_running == 0)
    assert load().tokens_out - before < 4 * 400


def test_one_answer_that_fails_ends_the_whole_request(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = server.gateway.client.submit
    before = server.gateway.client.load().tokens_out

    def refuse_the_third(request: Any) -> None:
        if request.request_id.endswith("-2"):
            raise OverloadedError("full")
        submit(request)

    monkeypatch.setattr(server.gateway.client, "submit", refuse_the_third)
    for stream in (False, True):
        response = complete(server, n=4, max_tokens=400, ignore_eos=True, stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
    monkeypatch.undo()
    until(lambda: server.gateway.client.load().num_running == 0)
    assert server.gateway.client.load().tokens_out - before < 2 * 4 * 400


# Log-probabilities.


def test_completion_logprobs_are_the_models_own_in_openais_shape(
    server: LocalServer, client: openai.OpenAI, model: torch.nn.Module
) -> None:
    answer = client.completions.create(
        model=BASE_ID, prompt="the quick", max_tokens=10, logprobs=3, **GREEDY
    )
    assert follows_its_own_types(answer)
    choice = answer.choices[0]
    prompt = server.codec.encode("the quick")
    tokens = server.alone.answer(prompt, None, 10)
    expected = own_logprobs(model, [*prompt, *tokens])[len(prompt) - 1 :]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == [server.codec.tokens.name(each) for each in tokens]
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    for place, token in enumerate(tokens):
        assert math.isclose(
            logprobs.token_logprobs[place], float(expected[place, token]), rel_tol=1e-9
        )
        best = [server.codec.tokens.name(each) for each in expected[place].topk(3).indices.tolist()]
        assert list(logprobs.top_logprobs[place]) == best
    assert choice.text == "".join(
        choice.text[start:end]
        for start, end in zip(
            logprobs.text_offset or [],
            [*(logprobs.text_offset or [])[1:], len(choice.text)],
            strict=True,
        )
    )


def test_a_drawn_token_stands_beside_the_best_ones(server: LocalServer) -> None:
    choice = complete(
        server, temperature=0.7, seed=3, logprobs=1, max_tokens=30, ignore_eos=True
    ).json()["choices"][0]
    logprobs = choice["logprobs"]
    sizes = {len(each) for each in logprobs["top_logprobs"]}
    assert sizes == {1, 2}
    for token, logprob, best in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert best[token] == logprob


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_completion_logprobs_joined_are_the_whole_ones(
    server: LocalServer, client: openai.OpenAI, n: int
) -> None:
    options: dict[str, Any] = {
        "model": "sampler",
        "prompt": "the quick",
        "max_tokens": 24,
        "logprobs": 2,
        "echo": True,
        "n": n,
        "seed": 5,
        "temperature": 1.5,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**options)
    joined: list[dict[str, list[Any]]] = [
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for _ in range(n)
    ]
    texts = [""] * n
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                for name, values in choice.logprobs.model_dump().items():
                    joined[choice.index][name] += values
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert joined[choice.index] == choice.logprobs.model_dump()


def test_chat_logprobs_have_bytes_that_joined_are_the_answer(
    server: LocalServer, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {
        "model": BASE_ID,
        "messages": MESSAGES,
        "max_tokens": 30,
        "logprobs": True,
        "top_logprobs": 2,
        # This untrained model draws half characters all the time.
        "temperature": 1.0,
        "seed": 8,
        "extra_body": {"ignore_eos": True},
    }
    answer = client.chat.completions.create(**options)
    assert follows_its_own_types(answer)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 30
    assert {len(one.top_logprobs) for one in logprobs.content} == {2}
    written = b"".join(bytes(one.bytes or []) for one in logprobs.content)
    assert written.decode(errors="replace") == answer.choices[0].message.content
    assert any(one.token.startswith("bytes:") for one in logprobs.content)
    streamed: list[ChatCompletionTokenLogprob] = []
    for chunk in client.chat.completions.create(**options, stream=True):
        assert follows_its_own_types(chunk)
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == logprobs.content


def test_without_being_asked_for_there_are_no_logprobs(
    server: LocalServer, client: openai.OpenAI
) -> None:
    chat = client.chat.completions.create(
        model=BASE_ID, messages=MESSAGES, max_tokens=3, logprobs=False
    )
    assert chat.choices[0].logprobs is None
    assert complete(server).json()["choices"][0]["logprobs"] is None


def test_a_stop_string_over_several_tokens_ends_text_and_logprobs_together(
    server: LocalServer,
) -> None:
    full = complete(server, max_tokens=30, ignore_eos=True, logprobs=0).json()["choices"][0]
    starts = full["logprobs"]["text_offset"]
    # From the middle of one token's text to the middle of a later one's.
    stop = full["text"][starts[8] - 1 : starts[12] + 1]
    at = full["text"].index(stop)
    assert len(stop) > 3 and at < starts[12]
    cut = complete(server, max_tokens=30, ignore_eos=True, logprobs=0, stop=[stop]).json()
    choice = cut["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (full["text"][:at], "stop")
    shown = [start for start in starts if start < at]
    assert choice["logprobs"]["text_offset"] == shown
    assert choice["logprobs"]["tokens"] == full["logprobs"]["tokens"][: len(shown)]
    late = complete(server, max_tokens=30, ignore_eos=True, stop=[stop], min_tokens=30).json()
    assert late["usage"]["completion_tokens"] == 30


# Echo.


@pytest.mark.parametrize("prompt", ["the quick é🦊 fox", [70, 71, 72, 73]])
def test_echo_shows_the_prompt_before_each_answer(server: LocalServer, prompt: Any) -> None:
    shown = prompt if isinstance(prompt, str) else server.codec.decode(prompt)
    plain = complete(server, prompt=prompt, ignore_eos=True).json()
    echoed = complete(server, prompt=prompt, ignore_eos=True, echo=True, n=2).json()
    expected = shown + plain["choices"][0]["text"]
    assert [each["text"] for each in echoed["choices"]] == [expected] * 2
    assert echoed["choices"][0]["logprobs"] is None
    assert echoed["usage"]["completion_tokens"] == 2 * plain["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(
    server: LocalServer, client: openai.OpenAI, model: torch.nn.Module, stream: bool
) -> None:
    text = "the quick brown é🦊 fox jumps over the lazy dog, " * 3  # several chunks
    tokens = server.codec.encode(text)
    assert len(tokens) > server.world.settings.engine.max_step_tokens
    options: dict[str, Any] = {
        "model": BASE_ID,
        "prompt": text,
        "max_tokens": 0,
        "echo": True,
        "logprobs": 2,
    }
    if stream:
        chunks = list(client.completions.create(**options, stream=True))
        (choice,) = (choice for chunk in chunks for choice in chunk.choices)
    else:
        answer = client.completions.create(**options)
        (choice,) = answer.choices
        assert answer.usage is not None and answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens == len(tokens)
    assert (choice.text, choice.finish_reason) == (text, "length")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == [server.codec.tokens.name(each) for each in tokens]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    expected = own_logprobs(model, tokens)
    for place, token in enumerate(tokens[1:], start=1):
        assert math.isclose(
            logprobs.token_logprobs[place], float(expected[place - 1, token]), rel_tol=1e-9
        )
    assert logprobs.text_offset is not None
    for name, start in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert name.startswith("bytes:") or text.startswith(name, start)


def test_a_prompt_is_scored_by_the_adapter_it_is_sent_to(server: LocalServer) -> None:
    fields = {"prompt": "the quick", "max_tokens": 0, "echo": True, "logprobs": 0}
    scores = [
        complete(server, model=name, **fields).json()["choices"][0]["logprobs"]["token_logprobs"]
        for name in (BASE_ID, "sampler")
    ]
    assert scores[0][1:] != scores[1][1:]


def test_no_tokens_without_echo_is_a_400(server: LocalServer) -> None:
    response = complete(server, max_tokens=0)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


# Anything at all.

numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-3, 3),
    st.integers(-3, 30),
    st.sampled_from([-(2**70), 2**70, 1e-300, 1e300]),
)
junk = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.just([]), st.just({}), numbers)
token_keys = st.integers(-1, 400).map(str)
any_fields = st.fixed_dictionaries(
    {},
    optional={
        "n": st.one_of(st.integers(0, 3), junk),
        "max_tokens": st.one_of(st.integers(0, 3), junk),
        "min_tokens": st.one_of(st.integers(0, 3), junk),
        "temperature": st.one_of(st.floats(0, 2), numbers, junk),
        "top_p": st.one_of(st.floats(0, 1), numbers, junk),
        "top_k": st.one_of(st.integers(-1, 400), junk),
        "min_p": st.one_of(st.floats(0, 1), numbers, junk),
        "presence_penalty": numbers,
        "frequency_penalty": numbers,
        "repetition_penalty": st.one_of(st.floats(0.01, 100), numbers),
        "logit_bias": st.one_of(st.dictionaries(token_keys, numbers, max_size=3), junk),
        "logprobs": st.one_of(st.integers(0, 21), junk),
        "top_logprobs": st.one_of(st.integers(0, 21), junk),
        "echo": st.one_of(st.booleans(), junk),
        "seed": st.one_of(st.integers(0, 5), numbers),
        "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3), junk),
        "stop_token_ids": st.one_of(st.lists(st.integers(-1, 320), max_size=4), junk),
        "ignore_eos": st.one_of(st.booleans(), junk),
        "stream": st.booleans(),
        "best_of": st.integers(0, 2),
    },
)


@settings(max_examples=50)
@given(fields=any_fields, is_chat=st.booleans())
def test_whatever_is_asked_is_answered_or_refused_by_name(
    server: LocalServer, fields: dict[str, Any], is_chat: bool
) -> None:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    prompt = {"messages": MESSAGES} if is_chat else {"prompt": ["the", "a few"]}
    body = {"model": BASE_ID, "max_tokens": 2, **prompt, **fields}
    errors = server.gateway.client.load().step_errors
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["param"].split(".")[0] in {*fields, "min_tokens"}
    elif fields.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
    else:
        choices = response.json()["choices"]
        assert len(choices) == (1 if is_chat else 2) * (fields.get("n") or 1)
    assert server.gateway.client.load().step_errors == errors
