"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.answer_text import Delta
from deployments.api import Api, api_of, caller_of, new_request_id
from deployments.errors import http_error
from deployments.event_stream import EventStreamResponse, merged
from deployments.generation import Generation
from deployments.openai_responses import DONE, Kind, ResponseWriter, Usage, event
from deployments.openai_schema import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from deployments.text import PromptText
from storage.errors import ContextLengthError, InvalidRequestError
from workers.engine.request import EngineRequest

router = APIRouter()

Result = TypeVar("Result")


@router.post("/v1/completions")
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Continue each prompt; a list of prompts has `n` choices for each, in their order."""
    api = api_of(request)
    limit = body.token_limit()
    prompts = await api.on_text(lambda: _read_all(api, body.prompts(), body.echoes_prompt))
    return await _answer(request, body, "completion", prompts, limit)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, in the model's own chat template."""
    api = api_of(request)
    messages = [message.as_template_input() for message in body.messages]
    prompt = await api.on_text(lambda: api.codec.encode_chat(messages))
    limit = body.token_limit() or max(1, api.codec.context_tokens - len(prompt))
    return await _answer(request, body, "chat", [_Prompt(prompt)], limit)


@dataclass(frozen=True, slots=True)
class _Prompt:
    token_ids: Sequence[int]
    echo: PromptText | None = None  # how to show it before each of its answers


@dataclass(frozen=True, slots=True)
class _Answers:
    """The generations of one HTTP request: `n` for each of its prompts, one after another."""

    generations: list[Generation]
    n: int

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many answers it has."""
        first_answers = self.generations[:: self.n]
        return Usage(
            prompt_tokens=sum(len(each.request.prompt_token_ids) for each in first_answers),
            completion_tokens=sum(each.num_tokens for each in self.generations),
            cached_tokens=sum(each.num_cached_tokens for each in first_answers),
        )

    @property
    def headers(self) -> dict[str, str]:
        """Who answered. Several prompts may have been answered by several replicas."""
        first = self.generations[0]
        version = first.request.adapters.version
        headers = {
            "x-replica-id": ",".join(sorted({each.replica_id for each in self.generations})),
            "x-queue-time-ms": f"{1000 * max(each.queue_time_s for each in self.generations):.1f}",
        }
        if version is not None:
            headers["x-adapter-version"] = version
        if first.adapter_tier is not None:
            headers["x-adapter-tier"] = first.adapter_tier
        return headers

    async def close(self) -> None:
        for each in self.generations:
            await each.close()


async def _answer(
    request: Request,
    body: GenerationRequest,
    kind: Kind,
    prompts: Sequence[_Prompt],
    max_tokens: int,
) -> Response:
    api = api_of(request)
    answers = _Answers(
        await _generations(api, request, body, prompts, max_tokens), body.num_answers
    )
    writer = ResponseWriter(
        kind,
        api.codec.tokens,
        new_request_id(),
        body.model,
        int(time.time()),
        with_usage=body.wants_usage_chunk,
        with_logprobs=body.num_logprobs is not None,
    )
    if body.stream:
        return await _stream(answers, writer)
    try:
        texts = await _together([each.text() for each in answers.generations])
    finally:
        await answers.close()
    return JSONResponse(writer.whole(texts, answers.usage), headers=answers.headers)


async def _generations(
    api: Api,
    request: Request,
    body: GenerationRequest,
    prompts: Sequence[_Prompt],
    max_tokens: int,
) -> list[Generation]:
    """`n` generations for each prompt, none of them started. Raises what is wrong with the request."""
    if len(prompts) * body.num_answers > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with {body.num_answers} answers each are more than {MAX_CHOICES} choices",
            param="n",
        )
    stops = body.stop_strings()
    # Without a seed of the client's, each prompt gets one of its own.
    samplings = [body.sampling(max_tokens) for _ in prompts]
    for prompt in prompts:
        _check_length(api, prompt.token_ids, max_tokens)
    tenant = caller_of(request).tenant
    model = await api.names.resolve(body.model, tenant)
    request_id = new_request_id()
    return [
        Generation(
            api.gateway,
            api.codec,
            EngineRequest(
                # Not the client's own id, which it may use twice at a time.
                request_id=f"{request_id}-{index}-{choice}",
                prompt_token_ids=tuple(prompt.token_ids),
                sampling=sampling.of_choice(choice),
                adapters=model.adapters,
                tenant=tenant,
                deadline_s=time.time() + api.request_timeout_s,
                trace_id=request.scope["request_id"],
                work_per_token=model.work_per_token,
            ),
            stops,
            prompt.echo,
        )
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        for choice in range(body.num_answers)
    ]


async def _stream(answers: _Answers, writer: ResponseWriter) -> Response:
    """A stream, once every generation has its first output: until then a refusal is a status."""
    try:
        await _together([each.start() for each in answers.generations])
    except BaseException:
        await answers.close()
        raise
    return EventStreamResponse(_events(answers, writer), answers.close, answers.headers)


async def _events(answers: _Answers, writer: ResponseWriter) -> AsyncGenerator[bytes, None]:
    for index in range(len(answers.generations)):
        opening = writer.opening(index)
        if opening is not None:
            yield event(opening)
    try:
        sources: list[AsyncGenerator[Delta, None]] = [each.deltas() for each in answers.generations]
        async for index, delta in merged(sources):
            for chunk in writer.piece(index, delta):
                yield event(chunk)
    except Exception as error:
        # The status is long sent; OpenAI's clients raise on an event with an error.
        yield event(http_error(error).body)
        return
    if writer.with_usage:
        yield event(writer.usage_chunk(answers.usage))
    yield DONE


def _read_all(
    api: Api, prompts: Sequence[str] | Sequence[list[int]], echoes: bool
) -> list[_Prompt]:
    read = []
    for prompt in prompts:
        tokens = api.codec.encode(prompt) if isinstance(prompt, str) else prompt
        read.append(_Prompt(tokens, api.codec.prompt_text(prompt, tokens) if echoes else None))
    return read


def _check_length(api: Api, prompt: Sequence[int], max_tokens: int) -> None:
    context = api.codec.context_tokens
    if len(prompt) + max_tokens > context:
        raise ContextLengthError(
            f"{len(prompt)} prompt tokens and up to {max_tokens} new ones do not fit the model's "
            f"context of {context} tokens",
            param="max_tokens" if len(prompt) < context else "prompt",
        )


async def _together(calls: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all calls. The first error ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
