"""GET /metrics, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.api import Admin, api_of
from storage.errors import OverloadedError

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, admin: Admin) -> Response:
    """Figures of this ingress and of all replicas; also while the placement manager is away. Needs an admin key."""
    api = api_of(request)
    try:
        state = await api.cluster_state()
    except OverloadedError:
        state = None
    accept = request.headers.get("accept", "")
    shown = await asyncio.to_thread(api.metrics.expose, state, accept)
    return Response(shown.body, headers={"content-type": shown.content_type})
