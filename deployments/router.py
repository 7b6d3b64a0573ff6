"""The request router of the engine deployment: Serve asks it, `cluster.routing` answers.

It runs beside each handle to the engine, so in the ingress's process, and reads that process's view of the placement
table. Serve tries the groups of replicas in order; within a group it would pick the shortest queue, so each group
here is one replica, in our order.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.actor import PlacementSpec
from cluster.lost_replicas import LostReplicas
from cluster.routing import Routing
from deployments.gateway import PreviewsOf
from deployments.outcomes import Heard, shared_outcomes
from deployments.table_poller import shared_view
from workers.engine.request import EngineRequest


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Routes `EngineRequest`s to replicas that have their adapter; everything else to the least busy replica."""

    def initialize_state(self, spec: dict[str, Any]) -> None:
        """`spec` is a `PlacementSpec` as JSON: Serve hands it over from the deployment's settings."""
        self._view = shared_view(PlacementSpec.model_validate(spec))
        self._routing = Routing(time.monotonic)
        self._lost = LostReplicas(time.monotonic)
        self._heard = Heard()
        self._waiting: dict[asyncio.Future[Any], str] = {}  # for a replica; by attempt
        self._accepted: dict[str, str] = {}  # the replica that has each attempt

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        meant = _meant(pending_request)
        if meant in by_id:
            return [[by_id[meant]]]
        for replica_id, outcome in self._heard.take():
            self._routing.hear(replica_id, outcome)
        request = _engine_request(pending_request)
        version = request.adapters.version if request else None
        order = self._routing.order(version, by_id.keys(), self._view.table)
        order = self._lost.put_last(order, _avoided(pending_request))
        is_waiting = pending_request is not None and not pending_request.future.done()
        if pending_request is not None and is_waiting and request is not None and order:
            self._watch(pending_request)
            self._choose(pending_request, request, order[0])
        return [[by_id[replica_id]] for replica_id in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Serve calls this when a replica has accepted; it may be another than the first choice."""
        request = _engine_request(pending_request)
        if request is not None:
            self._choose(pending_request, request, replica_id.unique_id)
            self._accepted[pending_request.metadata.internal_request_id] = replica_id.unique_id
            shared_outcomes().expect(request.request_id, replica_id.unique_id, self._heard)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls this when a replica's answer has ended, however it did, and when a replica has not accepted."""
        if internal_request_id not in self._accepted:
            self._routing.reject(internal_request_id)
        elif self._accepted[internal_request_id] == replica_id.unique_id:
            del self._accepted[internal_request_id]
            self._routing.finish(internal_request_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve calls this when a call to the replica failed for good, long before its own health check notices."""
        super().on_replica_actor_died(replica_id)
        self._lost.add(replica_id.unique_id)
        self._view.record_lost(replica_id.unique_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Serve calls this when the replica could not be reached; it may live, so nobody else is told."""
        super().on_replica_actor_unavailable(replica_id)
        self._lost.add(replica_id.unique_id)

    def _watch(self, pending: PendingRequest) -> None:
        """Serve tells nobody of a request that is cancelled before a replica was found for it."""
        if pending.future not in self._waiting:
            self._waiting[pending.future] = pending.metadata.internal_request_id
            pending.future.add_done_callback(self._stop_waiting)

    def _stop_waiting(self, future: asyncio.Future[Any]) -> None:
        attempt = self._waiting.pop(future)
        if future.cancelled():
            self._routing.give_up(attempt)

    def _choose(self, pending: PendingRequest, request: EngineRequest, replica_id: str) -> None:
        attempt, version = pending.metadata.internal_request_id, request.adapters.version
        if version is not None and not self._routing.is_chosen(attempt):
            self._view.record(version, request.work)
        self._routing.choose(attempt, replica_id, request.work)


def _engine_request(pending: PendingRequest | None) -> EngineRequest | None:
    if pending is not None and pending.args and isinstance(pending.args[0], EngineRequest):
        return pending.args[0]
    return None


def _meant(pending: PendingRequest | None) -> str | None:
    """The one replica a call is for, if it is for one. One that is gone is stood in for by any, which says nothing."""
    if pending is not None and pending.args and isinstance(pending.args[0], PreviewsOf):
        return pending.args[0].replica_id
    return None


def _avoided(pending: PendingRequest | None) -> str:
    """What `ServeGateway` says beside the request: the replica that has just failed it."""
    if pending is not None and len(pending.args) > 1:
        return str(pending.args[1])
    return ""
