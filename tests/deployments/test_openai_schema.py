"""What a client may send: neutral values pass, everything else that is not supported is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest
from storage.errors import InvalidRequestError, UnsupportedFieldError
from workers.engine.request import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": MESSAGES, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hi", **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("store", True),
        ("metadata", {"trace": "7"}),
        ("n", None),
        ("logprobs", None),
        ("top_logprobs", None),
        ("logit_bias", None),
        ("echo", None),
        ("best_of", 1),
        ("suffix", None),
        ("service_tier", "auto"),
        ("parallel_tool_calls", True),
    ],
)
def test_a_field_that_asks_for_nothing_is_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}) == chat()
    assert completion(**{field: value}) == completion()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("best_of", 2),
        ("audio", {"voice": "x"}),
        ("temprature", 1.0),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    for build in (chat, completion):
        with pytest.raises(UnsupportedFieldError, match=field) as caught:
            build(**{field: value})
        assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("logprobs", True),
        ("logprobs", 21),
        ("min_p", "0.1"),
        ("logit_bias", [5]),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("stream", "yes"),
        ("stop", [1]),
        ("seed", 2**63),
        ("stream_options", {"include": True}),
    ],
)
def test_a_wrong_value_is_refused_with_the_fields_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_a_string_several_strings_or_tokens(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts() == expected


@pytest.mark.parametrize("prompt", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt).prompts()
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [None] * 100),
        ("prompt", [["a"] * 100_000] * 128),
        ("stop", [1] * 100_000),
        ("stop_token_ids", ["a"] * 1000),
        ("messages", [1] * 100_000),
        ("messages", [{"role": "user", "content": [1] * 100_000}]),
        ("messages", MESSAGES * 100_000),
    ],
)
def test_a_long_list_is_refused_at_its_first_wrong_item(field: str, value: Any) -> None:
    """What is wrong with each of a million items takes minutes to say, and nobody is answered meanwhile."""
    with pytest.raises(ValidationError) as caught:
        chat(messages=value) if field == "messages" else completion(**{field: value})
    assert caught.value.error_count() <= 6  # one for each alternative of a union


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ["a"] * 129),
        ("prompt", [[1]] * 129),
        ("prompt", [1] * (2**19 + 1)),
        ("logit_bias", {str(token): "a" for token in range(100_000)}),
    ],
)
def test_what_is_too_long_is_refused_unread(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**{field: value})
    assert caught.value.param == field


def test_unknown_fields_without_number_are_not_listed() -> None:
    many = {f"field-{number}": 1 for number in range(100_000)}
    with pytest.raises(InvalidRequestError):
        completion(stream_options=many)
    with pytest.raises(InvalidRequestError):
        TokenizeRequest.model_validate(many)


@pytest.mark.parametrize(
    "prompt", [[100_000] * 400_000, [[100_000] * 131_072] * 4, "a" * (3 << 20)]
)
def test_prompts_as_long_as_any_context_are_taken(prompt: Any) -> None:
    assert sum(map(len, completion(prompt=prompt).prompts())) >= 400_000


def test_sampling_takes_openais_defaults_and_a_seed_of_its_own() -> None:
    first, second = completion().sampling(16), completion().sampling(16)
    assert (first.temperature, first.top_p, first.top_k) == (1.0, 1.0, 0)
    assert first.seed != second.seed
    assert completion(seed=-5, temperature=None, top_k=-1).sampling(16).seed == -5


def test_sampling_has_every_field_that_was_sent() -> None:
    fields = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "ignore_eos": True,
    }
    expected = SamplingParams(
        max_tokens=5,
        stop_token_ids=frozenset({8}),
        logit_bias=((5, 1.0), (6, -100.0)),
        logprobs=2,
        **fields,  # type: ignore[arg-type]
    )
    others = {"stop_token_ids": [8], "logit_bias": {"5": 1, "6": -100.0}}
    assert completion(**fields, **others, logprobs=2).sampling(5) == expected
    assert chat(**fields, **others, logprobs=True, top_logprobs=2).sampling(5) == expected
    echoed = completion(**fields, **others, logprobs=2, echo=True).sampling(5)
    assert echoed == replace(expected, prompt_logprobs=2)
    assert completion(echo=True).sampling(5).prompt_logprobs is None
    assert chat(logprobs=True).sampling(5).logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).sampling(5).logprobs is None


@pytest.mark.parametrize("key", ["the", "-1", "1.0", " 1", "\u0663", "", "1\n", "9" * 5000])
def test_a_bias_is_of_a_token_id(key: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(logit_bias={key: 1}).sampling(5)
    assert caught.value.param == "logit_bias"


def test_a_token_has_one_bias() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(logit_bias={"5": 1, "05": 2}).sampling(5)
    assert caught.value.param == "logit_bias"


def test_no_tokens_may_be_asked_for_only_to_score_a_prompt() -> None:
    assert completion(max_tokens=0, echo=True).token_limit() == 0
    assert completion().token_limit() == 16
    with pytest.raises(InvalidRequestError) as caught:
        completion(max_tokens=0).token_limit()
    assert caught.value.param == "max_tokens"
    with pytest.raises(ValidationError):
        chat(max_tokens=0)


@pytest.mark.parametrize("field", ["logprobs", "echo"])
def test_a_field_of_the_other_api_is_refused(field: str) -> None:
    with pytest.raises((ValidationError, UnsupportedFieldError), match=field):
        chat(**{field: 3 if field == "logprobs" else True})
    with pytest.raises(UnsupportedFieldError, match="top_logprobs"):
        completion(top_logprobs=2)


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(max_tokens=5, max_completion_tokens=6).token_limit()
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError) as caught:
        chat(stream_options={"include_usage": True}).sampling(5)
    assert caught.value.param == "stream_options"
    with pytest.raises(InvalidRequestError) as caught:
        chat(min_tokens=6).sampling(5)
    assert caught.value.param == "min_tokens"
    with pytest.raises(InvalidRequestError) as caught:
        chat(top_logprobs=2).sampling(5)
    assert caught.value.param == "top_logprobs"
    with pytest.raises(InvalidRequestError) as caught:
        chat(stop=["a", ""]).stop_strings()
    assert caught.value.param == "stop"


def test_text_parts_are_joined_and_a_developer_is_a_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "developer", "content": parts}]}
    )
    assert request.messages[0].as_template_input() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "tool", "content": "x"},
        {"role": "user"},
    ],
)
def test_messages_other_than_text_are_refused(message: Any) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"model": "m", "messages": [message]})
