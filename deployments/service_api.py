"""GET /health and /version, POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from deployments.api import api_of
from deployments.openai_schema import DetokenizeRequest, TokenizeRequest
from deployments.version import VERSION
from storage.errors import InvalidRequestError, OverloadedError

router = APIRouter()

_TABLE_TELLS_S = 2.0
"""A table this young names replicas whose hearts beat."""


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while some replica can answer, 503 else."""
    api = api_of(request)
    has_heartbeat = api.view.age_s < _TABLE_TELLS_S and api.view.table.replicas
    if not has_heartbeat and not await api.gateway.is_anyone_there():
        raise OverloadedError("no engine replica answers")
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": VERSION}


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a prompt, or of a conversation in the model's chat template."""
    api = api_of(request)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        messages = [message.as_template_input() for message in body.messages]
        tokens = await api.on_text(lambda: api.codec.encode_chat(messages))
    else:
        tokens = await api.on_text(
            lambda: api.codec.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        )
    return {"tokens": tokens, "count": len(tokens), "max_model_len": api.codec.context_tokens}


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, str]:
    """The text of tokens, special ones included."""
    api = api_of(request)
    return {"prompt": await api.on_text(lambda: api.codec.decode_all(body.tokens))}
