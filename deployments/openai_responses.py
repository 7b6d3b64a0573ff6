"""What goes back to a client, in OpenAI's shapes: plain dictionaries, ready for JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.answer_text import Delta, ScoredToken
from deployments.openai_logprobs import chat_logprobs, completion_logprobs
from deployments.token_text import TokenTexts

Kind = Literal["completion", "chat"]
_PREFIX: dict[Kind, str] = {"completion": "cmpl-", "chat": "chatcmpl-"}
_WHOLE: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion"}
_CHUNK: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion.chunk"}

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompts, whose keys and values were known already

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class ResponseWriter:
    """Writes one response, whole or in chunks.

    Args:
        texts: what tokens are called in log-probabilities.
        model: as the client named it.
        created_s: seconds since 1970.
        with_usage: chunks end with one that has the usage; the others say null.
        with_logprobs: a choice has log-probabilities, be they of no token at all.
    """

    kind: Kind
    texts: TokenTexts
    response_id: str
    model: str
    created_s: int
    with_usage: bool = False
    with_logprobs: bool = False

    def whole(self, answers: list[Delta], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(_WHOLE), "choices": choices, "usage": usage.as_json()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before any text, where the API has one."""
        if self.kind == "completion":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a piece of text: with its finish reason, if it has one, in a chunk of its own for chat."""
        logprobs = self._logprobs(delta.tokens) if delta.tokens else None
        if self.kind == "completion":
            return [self._chunk(index, {"text": delta.text}, delta.finish_reason, logprobs)]
        chunks = []
        if delta.text or delta.tokens:
            content = {"delta": {"content": delta.text}}
            chunks.append(self._chunk(index, content, logprobs=logprobs))
        if delta.finish_reason:
            chunks.append(self._chunk(index, {"delta": {}}, delta.finish_reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head(_CHUNK), "choices": [], "usage": usage.as_json()}

    def _head(self, objects: Mapping[Kind, str]) -> dict[str, Any]:
        return {
            "id": _PREFIX[self.kind] + self.response_id,
            "object": objects[self.kind],
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head(_CHUNK), "choices": [choice], **usage}

    def _choice(self, index: int, answer: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {"text": answer.text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(answer.tokens) if self.with_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        if self.kind == "completion":
            return completion_logprobs(tokens, self.texts)
        return chat_logprobs(tokens, self.texts)


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
