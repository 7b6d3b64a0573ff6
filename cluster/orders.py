"""What one replica is told to hold, from the plan and what it has. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cluster.live_replicas import LiveReplica
from cluster.placement import Placement
from cluster.table import AdapterFacts, ReplicaOrders
from storage.identity import AdapterVersion


def orders_for(
    replica: LiveReplica,
    plan: Placement,
    facts: Mapping[AdapterVersion, AdapterFacts],
    *,
    epoch: int,
    spare_rows: int,
    kept: Collection[AdapterVersion],
    bad: Collection[AdapterVersion],
    retired: Collection[AdapterVersion],
    near: tuple[AdapterVersion, ...],
) -> ReplicaOrders:
    """The answer to its report.

    Args:
        spare_rows: left out of what is pinned, for the largest adapter anybody may ask this replica for.
        kept: pinned before all others and whoever may ask for what, for an administrator wants them held.
        bad, retired: not to be held, whatever the plan says, which may be older.
        near: to be fetched to its disk at least.
    """
    replica_id, device = replica.report.replica_id, replica.device
    wanted = [
        version
        for version in plan.by_replica.get(replica_id, ())
        if version in facts and version not in bad and version not in retired
        if version in device or (version, replica_id) in plan.prefetch
    ]
    left = replica.report.rows
    pinned = set()
    for version in sorted(wanted, key=lambda version: version not in kept):
        spared = 0 if version in kept else spare_rows
        if facts[version].rows <= left - spared:
            left -= facts[version].rows
            pinned.add(version)
    return ReplicaOrders(
        epoch,
        tuple(wanted),
        frozenset(pinned),
        near,
        retired=device.intersection(retired),
        asks_all=replica.report.is_brief,
    )
