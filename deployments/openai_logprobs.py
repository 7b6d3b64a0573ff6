"""Log-probabilities in the two shapes OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.answer_text import ScoredToken
from deployments.token_text import TokenTexts

_LEAST = -9999.0
"""OpenAI's value for a token that is very unlikely."""


def completion_logprobs(tokens: Sequence[ScoredToken], texts: TokenTexts) -> dict[str, Any]:
    """Of /v1/completions: parallel lists, and null for what nothing precedes.

    `top_logprobs` has the chosen token beside the best ones. Of several tokens with the same text the best one counts.
    """
    return {
        "tokens": [texts.name(one.token) for one in tokens],
        "token_logprobs": [
            None if one.logprobs is None else _number(one.logprobs.logprob) for one in tokens
        ],
        "top_logprobs": [_by_name(one, texts) for one in tokens],
        "text_offset": [one.offset for one in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], texts: TokenTexts) -> dict[str, Any]:
    """Of /v1/chat/completions: one entry for each token. `bytes` is null for special tokens, which are no text."""
    return {
        "content": [
            {
                **_entry(one.token, one.logprobs.logprob, texts),
                "top_logprobs": [_entry(*best, texts) for best in one.logprobs.top],
            }
            for one in tokens
            if one.logprobs is not None
        ],
        "refusal": None,
    }


def _by_name(one: ScoredToken, texts: TokenTexts) -> dict[str, float] | None:
    if one.logprobs is None:
        return None
    named: dict[str, float] = {}
    for token, logprob in (*one.logprobs.top, (one.token, one.logprobs.logprob)):
        named.setdefault(texts.name(token), _number(logprob))
    return named


def _entry(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    part = texts.bytes_of(token)
    return {
        "token": texts.name(token),
        "logprob": _number(logprob),
        "bytes": None if part is None else list(part),
    }


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
