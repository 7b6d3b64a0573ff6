"""What a client may send, in OpenAI's names. What is not supported is refused by name, never ignored.

A field this server does not have is accepted only with the value that asks for nothing (`neutral_fields`).
"""

from __future__ import annotations

import re
import secrets
from abc import abstractmethod
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from deployments.chat_messages import Messages
from deployments.neutral_fields import without_neutral_fields
from deployments.request_bodies import SmallBody, shown_as
from storage.errors import InvalidRequestError
from workers.engine.request import MAX_LOGPROBS, SamplingParams

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for /v1/completions; a chat answer may fill the context."""
_MAX_STOP_STRINGS = 16
_MAX_STOP_TOKENS = 1024
_MAX_BIASES = 1024
_MAX_PROMPTS = 128
_MAX_ANSWERS = 16
_MAX_TOKENS = 1 << 19
MAX_CHOICES = 128
"""Of one response: its prompts times `n`."""
_TOKEN_ID = re.compile("[0-9]{1,10}")

# A long list is refused at its first wrong item: bodies are validated in the event loop.
_Tokens = Annotated[list[int], Field(fail_fast=True, max_length=_MAX_TOKENS)]
_Texts = Annotated[list[str], Field(fail_fast=True)]


class StreamOptions(SmallBody):
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """The fields completions and chat share. None means the field was not sent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(default=None, ge=1, le=_MAX_ANSWERS)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1: all tokens.")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | _Texts | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        default=None, max_length=_MAX_STOP_TOKENS
    )
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, body: Any) -> Any:
        return without_neutral_fields(body, cls.model_fields) if isinstance(body, dict) else body

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _has_few_biases(cls, biases: Any) -> Any:
        if isinstance(biases, dict) and len(biases) > _MAX_BIASES:
            raise InvalidRequestError(
                f"logit_bias takes up to {_MAX_BIASES} tokens", param="logit_bias"
            )
        return biases

    @property
    def wants_usage_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def stop_strings(self) -> list[str]:
        """Raises InvalidRequestError for an empty string, or too many."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MAX_STOP_STRINGS or not all(stops):
            raise InvalidRequestError(
                f"stop takes up to {_MAX_STOP_STRINGS} strings, none of them empty", param="stop"
            )
        return stops

    @property
    def num_answers(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the best tokens to tell beside each chosen one; None: no log-probabilities."""

    @property
    def echoes_prompt(self) -> bool:
        """Whether a choice begins with its prompt."""
        return False

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How to answer with at most `max_tokens` tokens. Without a seed of the client's, each call draws one.

        Raises:
            InvalidRequestError: names the field.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true", param="stream_options"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=self._biases(),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_logprobs if self.echoes_prompt else None,
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = self.logit_bias or {}
        wrong = next((key for key in biases if not _TOKEN_ID.fullmatch(key)), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"logit_bias has the key {wrong[:20]!r}; its keys are token ids", param="logit_bias"
            )
        return tuple((int(key), bias) for key, bias in biases.items())


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    model_config = shown_as(model="captain", prompt="How do I learn to swim?", max_tokens=64)

    prompt: str | _Texts | _Tokens | Annotated[list[_Tokens], Field(fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_not_too_long(cls, prompt: Any) -> Any:
        if not isinstance(prompt, list) or not prompt:
            return prompt
        most, what = (
            (_MAX_TOKENS, "tokens") if isinstance(prompt[0], int) else (_MAX_PROMPTS, "prompts")
        )
        if len(prompt) > most:
            raise InvalidRequestError(f"prompt takes up to {most} {what}", param="prompt")
        return prompt

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes_prompt(self) -> bool:
        return bool(self.echo)

    def token_limit(self) -> int:
        """Raises InvalidRequestError when nothing at all is asked for."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens: 0 is for scoring a prompt, so only allowed with echo: true",
                param="max_tokens",
            )
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt. Raises InvalidRequestError when there is none, or one without tokens."""
        prompt = self.prompt
        prompts: Any = prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompts = [prompt]
        if not prompts or [] in prompts:
            raise InvalidRequestError("a prompt has at least one token", param="prompt")
        return list(prompts)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    model_config = shown_as(
        model="captain",
        messages=[{"role": "user", "content": "How do I learn to swim?"}],
        max_tokens=64,
        stream=True,
    )

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """Raises InvalidRequestError for best tokens without log-probabilities."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
            )
        return None

    def token_limit(self) -> int | None:
        """Raises InvalidRequestError when the two names of the field disagree."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens are one field under two names and differ",
                param="max_tokens",
            )
        return old if new is None else new


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class TokenizeRequest(SmallBody):
    """POST /tokenize: a text, or a conversation in the model's template."""

    model_config = shown_as(prompt="How do I learn to swim?")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(SmallBody):
    """POST /detokenize."""

    model_config = shown_as(tokens=[2020, 536, 339])

    model: str | None = None
    tokens: _Tokens
