"""Adapters by replicas by tiers: the rows people look at, the most asked for first. Plain data in, plain JSON out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.state import ClusterState
from deployments.model_list import ModelList
from storage.identity import AdapterName, AdapterVersion

_TIERS = ("disk", "host", "device")  # the nearest one last

Row = tuple[str, str, AdapterVersion]
"""Tenant, adapter, version. A version that is near and has no name any more has empty ones."""


def residency(state: ClusterState, models: ModelList | None, limit: int | None) -> dict[str, Any]:
    """Rows of every version that an alias serves or will serve, or that some replica has near; and what they sum up to.

    Args:
        models: knows names and ranks; None while no list was read.
        limit: of rows; the sums count all.
    """
    tiers = _tiers(state)
    rows = _rows(state, models, tiers)
    ordered = sorted(
        rows,
        key=lambda row: (
            -state.demand.get(row[2], 0.0),
            -sum(tier == "device" for tier in tiers.get(row[2], {}).values()),
            row,
        ),
    )
    nearest = [_nearest(tiers.get(version, {})) for version in {row[2] for row in rows}]
    return {
        "adapters": [
            _view(row, rows[row], state, models, tiers.get(row[2], {})) for row in ordered[:limit]
        ],
        "totals": {
            "published": len(models.published.adapters) if models else None,
            "rows": len(rows),
            **{tier: nearest.count(tier) for tier in (*_TIERS, "registry")},
        },
    }


def _rows(
    state: ClusterState, models: ModelList | None, tiers: Mapping[AdapterVersion, Any]
) -> dict[Row, list[str]]:
    """Each row, and the aliases that serve it."""
    rows: dict[Row, list[str]] = {}
    for (tenant, name, alias), version in sorted(state.table.serving.items()):
        rows.setdefault((tenant, name, version), []).append(alias)
    for (tenant, name, _), move in state.moves.items():
        rows.setdefault((tenant, name, move.desired), [])
    named = {version for _, _, version in rows}
    for version, where in tiers.items():
        if version not in named and set(where.values()) != {"disk"}:
            owner = models.owners.get(version) if models else None
            rows[(owner.tenant, owner.name, version) if owner else ("", "", version)] = []
    return rows


def _tiers(state: ClusterState) -> dict[AdapterVersion, dict[str, str]]:
    """Version → replica → the nearest tier that has it there."""
    tiers: dict[AdapterVersion, dict[str, str]] = {}
    for report in state.reports:
        for tier in _TIERS:
            for version in getattr(report, tier):
                tiers.setdefault(version, {})[report.replica_id] = tier
    return tiers


def _nearest(where: Mapping[str, str]) -> str:
    return max(where.values(), key=_TIERS.index, default="registry")


def _view(
    row: Row,
    aliases: list[str],
    state: ClusterState,
    models: ModelList | None,
    where: Mapping[str, str],
) -> dict[str, Any]:
    tenant, name, version = row
    facts = state.table.facts.get(version)
    summary = models.summary(AdapterName(tenant, name), version) if models and name else None
    return {
        "id": name,
        "tenant": tenant,
        "version": version,
        "aliases": aliases,
        "rank": summary.rank if summary else facts.rows if facts else None,
        "demand": round(state.demand.get(version, 0.0), 2),
        "pinned_copies": state.pinned.get(version, 0),
        "moves": [
            {"alias": alias, "desired": move.desired, "reason": move.reason}
            for alias in aliases
            if (move := state.moves.get((tenant, name, alias))) is not None
        ],
        "failed": state.failed.get(version),
        "tiers": dict(where),
    }
