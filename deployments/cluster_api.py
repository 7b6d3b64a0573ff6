"""GET /v1/cluster: the placement as its manager has it. Needs an admin key, for it names everybody's adapters."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cluster.state import ClusterState
from cluster.table import ReplicaReport
from deployments.adapter_views import move_view
from deployments.api import Admin, api_of
from deployments.model_list import encode
from deployments.models_api import Limit, json_response
from deployments.residency import residency

router = APIRouter(prefix="/v1", tags=["cluster"])


@router.get("/cluster")
async def show_cluster(request: Request, admin: Admin, limit: Limit = None) -> Response:
    """Replicas by adapters by tiers, the most asked for first, and which alias does not serve what it should, and why.

    `limit` is of `adapters`; everything else is complete.
    """
    api = api_of(request)
    state, models = await api.cluster_state(), api.models.last

    def body() -> bytes:
        least, most = api.replica_range
        return encode(
            {
                **cluster_view(state),
                "replica_range": {"min": least, "max": most},
                **residency(state, models, limit),
            }
        )

    return json_response(await asyncio.to_thread(body))


def cluster_view(state: ClusterState) -> dict[str, Any]:
    return {
        "epoch": state.table.epoch,
        "base": state.table.base_id,
        "registry_error": state.registry_error,
        "replicas": [
            {**_replica(report), "heard_s": state.heard_s.get(report.replica_id)}
            for report in state.reports
        ],
        "serving": [
            {"tenant": tenant, "name": name, "alias": alias, "version": version}
            for (tenant, name, alias), version in sorted(state.table.serving.items())
        ],
        "moves": [
            {"tenant": tenant, "name": name, "alias": alias, **move_view(move)}
            for (tenant, name, alias), move in sorted(state.moves.items())
        ],
        "holders": {version: list(ids) for version, ids in state.table.holders.items()},
        "too_large": list(state.too_large),
        "no_room": list(state.no_room),
        "failed": dict(state.failed),
        "failed_on": {version: dict(where) for version, where in state.failed_on.items()},
        "pinned": dict(state.pinned),
        "is_settled": state.is_settled,
    }


def _replica(report: ReplicaReport) -> dict[str, Any]:
    return {
        "id": report.replica_id,
        "node": report.node_id,
        "rows": report.rows,
        "rows_used": report.rows_used,
        "work": report.work,
        "queued_work": report.queued_work,
        "running": report.num_running,
        "waiting": report.num_waiting,
        "slots": report.slots,
        "kv_used": report.kv_used,
        "loads": report.loads,
        "load_s": report.load_s,
        "misses": report.misses,
        "evictions": report.evictions,
        "tokens_out": report.tokens_out,
        "threads": report.threads,
        "load_wait_s": report.load_wait_s,
        "is_registry_up": report.is_registry_up,
        "failed": [
            {"version": each.version, "code": each.code, "message": each.message}
            for each in report.failed
        ],
        "device": list(report.device),
        "host": list(report.host),
        "disk": list(report.disk),
    }
