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
    """Figures of this ingress, of the training jobs it sees to, and of all replicas. Needs an admin key.

    They are there also while the placement manager is away.
    """
    api = api_of(request)
    try:
        state = await api.cluster_state()
    except OverloadedError:
        state = None
    accept = request.headers.get("accept", "")
    shown = await asyncio.to_thread(api.metrics.expose, state, accept, api.training.figures())
    return Response(shown.body, headers={"content-type": shown.content_type})
