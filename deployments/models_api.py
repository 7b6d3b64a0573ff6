"""GET /v1/models: the base model first, then the adapters, as OpenAI lists models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from deployments.api import Api, api_of, caller_of
from deployments.model_list import adapter_model, encode, list_body, page_of
from storage.errors import UnknownModelError

router = APIRouter(tags=["models"])

Limit = Annotated[
    int | None, Query(ge=1, le=100_000, description="At most so many; without it, all.")
]
After = Annotated[
    str | None,
    Query(max_length=512, description="Only what follows this id: the `last_id` of a page."),
]

_MODELS = {
    "object": "list",
    "data": [
        {"id": "smollm2", "object": "model", "created": 1, "owned_by": "flora", "parent": None},
        {
            "id": "captain",
            "object": "model",
            "created": 1760000000,
            "owned_by": "default",
            "parent": "smollm2",
        },
    ],
    "first_id": "smollm2",
    "last_id": "captain",
    "has_more": False,
}


@router.get("/v1/models", responses={200: {"content": {"application/json": {"example": _MODELS}}}})
async def list_models(request: Request, limit: Limit = None, after: After = None) -> Response:
    """Everything a request may name; complete unless `limit` is given, for OpenAI's client does not page."""
    api = api_of(request)
    models = await api.models.now()
    entries = models.entries(caller_of(request).tenant)
    bodies: list[bytes] = []
    ids: list[str] = []
    if after is None:
        bodies, ids = [encode(_base(api))], [api.base_id]
        limit = None if limit is None else limit - 1
    page = page_of(entries, None if after == api.base_id else after, limit)
    bodies += [entry.body for entry in page.entries]
    ids += [page.entries[0].id, page.entries[-1].id] if page.entries else []
    first_id, last_id = (ids[0], ids[-1]) if ids else (None, None)
    return json_response(list_body(bodies, first_id, last_id, page.has_more))


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """One model, under any name that a request may use for it."""
    api, tenant = api_of(request), caller_of(request).tenant
    resolved = await api.names.resolve(model, tenant)
    if resolved.name is None:
        return _base(api)
    models = await api.models.now()
    if resolved.name not in models.published.adapters:  # published after the list was made
        models = await api.models.fresh()
    adapter = models.published.adapters.get(resolved.name)
    if adapter is None:
        raise UnknownModelError(f"the model {model!r} does not exist", param="model")
    return {**adapter_model(adapter, api.base_id), "id": model}


def json_response(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _base(api: Api) -> dict[str, Any]:
    return {
        "id": api.base_id,
        "object": "model",
        "created": api.created_s,
        "owned_by": "flora",
        "parent": None,
    }
