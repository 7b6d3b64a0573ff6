"""GET /v1/adapters and /v1/cluster: which adapters there are, and where they lie."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from cluster.published import PublishedAdapter
from cluster.table import PlacementTable, ReplicaReport
from deployments.api import Api
from storage.summary import VersionSummary

router = APIRouter(prefix="/v1")


@router.get("/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """Every adapter with its versions and aliases, what each alias serves now, and who has it on a device."""
    api: Api = request.app.state.api
    published = await asyncio.to_thread(api.published)
    table = api.view.table
    data = [
        _adapter(adapter, table, api.base_id)
        for name, adapter in published.adapters.items()
        if name.tenant == api.tenant
    ]
    return {"object": "list", "data": data}


@router.get("/cluster")
async def show_cluster(request: Request) -> dict[str, Any]:
    """The placement as its manager has it: replicas by adapters by tiers, and each replica's work."""
    api: Api = request.app.state.api
    state = await api.cluster_state()
    return {
        "epoch": state.table.epoch,
        "base": state.table.base_id,
        "registry_error": state.registry_error,
        "replicas": [_replica(report) for report in state.reports],
        "serving": [
            {"tenant": tenant, "name": name, "alias": alias, "version": version}
            for (tenant, name, alias), version in sorted(state.table.serving.items())
        ],
        "holders": {version: list(ids) for version, ids in state.table.holders.items()},
        "too_large": list(state.too_large),
        "no_room": list(state.no_room),
    }


def _adapter(adapter: PublishedAdapter, table: PlacementTable, base_id: str) -> dict[str, Any]:
    name = adapter.name
    serving = {
        alias: table.serving.get((name.tenant, name.name, alias), version)
        for alias, version in adapter.aliases.items()
    }
    return {
        "id": name.name,
        "object": "adapter",
        "parent": base_id,
        "aliases": dict(adapter.aliases),
        "serving": serving,
        "versions": [_version(summary, table) for summary in adapter.versions],
    }


def _version(summary: VersionSummary, table: PlacementTable) -> dict[str, Any]:
    return {
        "version": summary.version,
        "family": summary.family,
        "rank": summary.rank,
        "bytes": summary.num_bytes,
        "created": int(summary.created_s),
        "source": summary.source,
        "resident": list(table.residents.get(summary.version, ())),
    }


def _replica(report: ReplicaReport) -> dict[str, Any]:
    return {
        "id": report.replica_id,
        "node": report.node_id,
        "rows": report.rows,
        "rows_used": report.rows_used,
        "work": report.work,
        "running": report.num_running,
        "waiting": report.num_waiting,
        "loads": report.loads,
        "evictions": report.evictions,
        "tokens_out": report.tokens_out,
        "threads": report.threads,
        "load_wait_s": report.load_wait_s,
        "device": list(report.device),
        "host": list(report.host),
        "disk": list(report.disk),
    }
