"""GET /v1/models: the base model first, then the adapters, as OpenAI lists models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from cluster.published import Published, PublishedAdapter
from deployments.api import Api
from storage.errors import UnknownModelError

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Everything a request may name; complete, for OpenAI's client does not page."""
    api: Api = request.app.state.api
    published = await asyncio.to_thread(api.published)
    adapters = [_adapter(api, each) for each in _own(api, published)]
    return {"object": "list", "data": [_base(api), *adapters]}


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """One model, under any name that a request may use for it."""
    api: Api = request.app.state.api
    resolved = await api.names.resolve(model, api.tenant)
    if resolved.adapters.is_base:
        return _base(api)
    version = resolved.adapters.version
    published = await asyncio.to_thread(api.published)
    for adapter in _own(api, published):
        if any(summary.version == version for summary in adapter.versions):
            return {**_adapter(api, adapter), "id": model}
    raise UnknownModelError(f"the model {model!r} does not exist", param="model")


def _own(api: Api, published: Published) -> list[PublishedAdapter]:
    return [each for name, each in published.adapters.items() if name.tenant == api.tenant]


def _base(api: Api) -> dict[str, Any]:
    return {
        "id": api.base_id,
        "object": "model",
        "created": api.created_s,
        "owned_by": "flora",
        "parent": None,
    }


def _adapter(api: Api, adapter: PublishedAdapter) -> dict[str, Any]:
    created_s = max((each.created_s for each in adapter.versions), default=0)
    return {
        "id": adapter.name.name,
        "object": "model",
        "created": int(created_s),
        "owned_by": adapter.name.tenant,
        "parent": api.base_id,
    }
