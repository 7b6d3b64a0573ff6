"""Tokens in, text out, each token at its place, however outputs are cut and wherever a stop string lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.answer_text import AnswerText, Delta, ScoredToken
from deployments.text import PromptText, TextCodec
from storage.identity import AdapterSet
from workers.config import EngineSettings
from workers.engine.request import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

# Letters that this tokenizer writes with one token, with parts of a token, and with several tokens.
texts = st.text(alphabet="the quickabcé🦊日", max_size=25)


@pytest.fixture(scope="module")
def codec(tiny_llama_dir: Path) -> TextCodec:
    return TextCodec.open(EngineSettings(base=str(tiny_llama_dir)))


def score(place: int) -> TokenLogprobs:
    """Another one for each token, so that none can be mistaken for another."""
    return TokenLogprobs(-float(place))


def outputs(tokens: Sequence[int], cuts: Sequence[int] = ()) -> list[RequestOutput]:
    """The tokens with their log-probabilities, cut after the given counts, and a last output without any."""
    bounds = sorted({cut % (len(tokens) + 1) for cut in cuts} | {0, len(tokens)})
    batches = [
        RequestOutput(
            "r",
            AdapterSet(),
            tuple(tokens[start:end]),
            new_logprobs=tuple(map(score, range(start, end))),
        )
        for start, end in pairwise(bounds)
    ]
    return [*batches, RequestOutput("r", AdapterSet(), finish_reason=FinishReason.STOP)]


def read(answer: AnswerText, batches: Sequence[RequestOutput]) -> list[Delta]:
    deltas = []
    for batch in batches:
        deltas.append(answer.push(batch))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def request(**sampling: int) -> EngineRequest:
    return EngineRequest("r", (5, 6), SamplingParams(max_tokens=500, **sampling))  # type: ignore[arg-type]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: Sequence[Delta]) -> list[ScoredToken]:
    return [token for delta in deltas for token in delta.tokens]


@given(text=texts, cuts=st.lists(st.integers(0, 100), max_size=6))
def test_every_token_is_told_once_at_the_place_of_its_text(
    codec: TextCodec, text: str, cuts: list[int]
) -> None:
    tokens = codec.encode(text)
    deltas = read(AnswerText(codec, request(logprobs=0), []), outputs(tokens, cuts))
    assert text_of(deltas) == text
    told = tokens_of(deltas)
    assert [(one.token, one.logprobs) for one in told] == [
        (token, score(place)) for place, token in enumerate(tokens)
    ]
    assert b"".join(codec.tokens.bytes_of(one.token) or b"" for one in told) == text.encode()
    written = b""
    for one in told:
        part = codec.tokens.bytes_of(one.token) or b""
        # Whole characters before the token: a part of one has the place where its character begins.
        assert one.offset == len(written.decode(errors="ignore"))
        written += part


@given(text=texts, stop=st.text(alphabet="the qu🦊", min_size=1, max_size=4))
def test_a_stop_string_ends_text_and_tokens_at_the_same_place(
    codec: TextCodec, text: str, stop: str
) -> None:
    tokens = codec.encode(text)
    deltas = read(
        AnswerText(codec, request(logprobs=0), [stop]), outputs(tokens, range(len(tokens)))
    )
    shown = text.split(stop)[0]
    assert text_of(deltas) == shown
    told = tokens_of(deltas)
    if stop in text:
        everything = tokens_of(read(AnswerText(codec, request(logprobs=0), []), outputs(tokens)))
        assert told == [one for one in everything if one.offset < len(shown)]
    else:
        assert len(told) == len(tokens)
    streamed = 0
    for delta in deltas[:-1]:
        streamed += len(delta.text)
        assert all(one.offset < streamed for one in delta.tokens)


@given(texts, st.integers(0, 30), st.text(alphabet="the qu", min_size=1, max_size=3))
def test_no_stop_string_ends_an_answer_before_min_tokens(
    codec: TextCodec, text: str, min_tokens: int, stop: str
) -> None:
    tokens = codec.encode(text)
    answer = AnswerText(codec, request(min_tokens=min_tokens), [stop])
    deltas = read(answer, outputs(tokens, range(len(tokens))))
    shown = text_of(deltas)
    if shown != text:
        assert answer.num_tokens >= min_tokens
        assert text.startswith(shown + stop)


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_counts(
    codec: TextCodec,
) -> None:
    tokens = [token for letter in "aXYb" for token in codec.encode(letter)]
    assert len(tokens) == 4

    def shown(min_tokens: int) -> tuple[str, str | None]:
        answer = AnswerText(codec, request(min_tokens=min_tokens), ["XY"])
        deltas = read(answer, outputs(tokens, range(4)))
        return text_of(deltas), deltas[-1].finish_reason

    assert shown(0) == shown(3) == ("a", "stop")
    assert shown(4) == ("aXYb", "stop")  # the stop of the last output


@given(prompt=texts.filter(bool), text=texts)
def test_an_echoed_prompt_comes_first_and_moves_what_follows(
    codec: TextCodec, prompt: str, text: str
) -> None:
    tokens, prompt_ids = codec.encode(text), codec.encode(prompt)
    asked = EngineRequest(
        "r", tuple(prompt_ids), SamplingParams(max_tokens=50, logprobs=0, prompt_logprobs=0)
    )
    scores = tuple(score(1000 + place) for place in range(1, len(prompt_ids)))
    first, *rest = outputs(tokens)
    scored = RequestOutput(
        "r",
        AdapterSet(),
        first.new_token_ids,
        first.finish_reason,
        new_logprobs=first.new_logprobs,
        prompt_logprobs=scores,
    )
    plain = read(AnswerText(codec, request(logprobs=0), []), [first, *rest])
    echo = codec.prompt_text(prompt, prompt_ids)
    echoed = read(AnswerText(codec, asked, [], echo), [scored, *rest])
    assert text_of(echoed) == prompt + text_of(plain)
    told = tokens_of(echoed)
    assert [one.token for one in told] == prompt_ids + tokens
    assert [one.logprobs for one in told[: len(prompt_ids)]] == [None, *scores]
    assert [one.offset for one in told[: len(prompt_ids)]] == list(echo.starts)
    assert [one.offset - len(prompt) for one in told[len(prompt_ids) :]] == [
        one.offset for one in tokens_of(plain)
    ]


def test_a_prompt_of_tokens_is_echoed_with_its_special_ones(codec: TextCodec) -> None:
    prompt = codec.encode("<|im_start|>é🦊 the")
    assert codec.prompt_text(prompt, prompt) == PromptText(
        "<|im_start|>é🦊 the",
        tuple([0, *(12,) * 2, *(13,) * 4, *range(14, 14 + len(prompt) - 7)]),
    )


def test_tokens_that_the_tokenizer_adds_to_a_prompt_are_no_text_of_it(tiny_llama_dir: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    codec = TextCodec(tokenizer, 512)
    tokens = codec.encode("ab")
    assert tokens[0] == begin
    assert codec.prompt_text("ab", tokens) == PromptText("ab", (0, 0, 1))
    assert codec.prompt_text(tokens, tokens) == PromptText("<|endoftext|>ab", (0, 13, 14))
