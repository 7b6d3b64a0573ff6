"""Adapters as the API shows them: plain JSON values from what the registry and the placement manager say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.published import Published, PublishedAdapter
from cluster.state import AliasMove, ClusterState
from cluster.table import PlacementTable
from storage.history import newest_good
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import Manifest
from storage.summary import VersionSummary


def adapter_view(
    adapter: PublishedAdapter, published: Published, table: PlacementTable, base_id: str
) -> dict[str, Any]:
    """One adapter in a list: what its aliases should mean (`aliases`) and do mean (`serving`), and its versions."""
    name = adapter.name
    return {
        "id": name.name,
        "object": "adapter",
        "tenant": name.tenant,
        "parent": base_id,
        "aliases": dict(adapter.aliases),
        "serving": {
            alias: table.serving.get((name.tenant, name.name, alias))
            or _would_serve(adapter, alias, published)
            for alias in adapter.aliases
        },
        "pinned_copies": adapter.pinned_copies,
        "versions": [
            {
                **version_view(summary),
                "quarantined": published.quarantined.get(summary.version),
                "resident": list(table.residents.get(summary.version, ())),
            }
            for summary in adapter.versions
        ],
    }


def adapter_details(
    adapter: PublishedAdapter, published: Published, state: ClusterState, base_id: str
) -> dict[str, Any]:
    """One adapter alone: also the history of its aliases, why one lags, and every tier that has a version.

    Args:
        state: with no reports where the placement manager does not answer; then only devices are known.
    """
    name = adapter.name
    shown = adapter_view(adapter, published, state.table, base_id)
    for version in shown["versions"]:
        version["tiers"] = _tiers(version["version"], state) or {"device": version["resident"]}
        version["failed"] = state.failed.get(version["version"])
        version["failed_on"] = dict(state.failed_on.get(version["version"], {}))
    return {
        **shown,
        "history": {alias: list(earlier) for alias, earlier in adapter.history.items()},
        "moves": {
            alias: move_view(move)
            for (tenant, adapter_name, alias), move in state.moves.items()
            if (tenant, adapter_name) == (name.tenant, name.name)
        },
    }


def version_view(summary: VersionSummary) -> dict[str, Any]:
    return {
        "version": summary.version,
        "family": summary.family,
        "rank": summary.rank,
        "bytes": summary.num_bytes,
        "created": int(summary.created_s),
        "source": summary.source,
    }


def move_view(move: AliasMove) -> dict[str, Any]:
    return {"desired": move.desired, "serving": move.serving, "reason": move.reason}


def published_view(
    name: AdapterName, manifest: Manifest, alias: str | None, base_id: str
) -> dict[str, Any]:
    """The answer to a publish."""
    return {
        "id": name.name,
        "object": "adapter.version",
        "tenant": name.tenant,
        "parent": base_id,
        "alias": alias,
        **version_view(VersionSummary.of(manifest)),
        "warnings": list(manifest.provenance.warnings),
    }


def _would_serve(
    adapter: PublishedAdapter, alias: str, published: Published
) -> AdapterVersion | None:
    """What an alias the table does not know yet will serve; None when all of its versions are in quarantine."""
    versions = (adapter.aliases[alias], *adapter.history.get(alias, ()))
    return newest_good(versions, lambda version: version not in published.quarantined)


def _tiers(version: AdapterVersion, state: ClusterState) -> Mapping[str, list[str]]:
    """Tier → replicas that have the version there."""
    tiers: dict[str, list[str]] = {}
    for report in state.reports:
        for tier in ("device", "host", "disk"):
            if version in getattr(report, tier):
                tiers.setdefault(tier, []).append(report.replica_id)
    return tiers
