"""The engine replica as a Serve deployment: an engine and its heartbeat, wired together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import ray
from ray import serve

from cluster.actor import PlacementSpec
from cluster.table import ReplicaOrders, ReplicaReport
from deployments.gateway import PreviewsOf, ReplicaOutputs
from deployments.heartbeat import Heartbeat
from deployments.load_signals import LoadSignals
from deployments.metrics.replica import replica_figures
from deployments.previews import PreviewStream
from deployments.replica_threads import replica_threads
from deployments.request_streams import RequestStreams
from deployments.settings import Settings
from storage.adapter_cache import AdapterCache
from storage.collecting import Collecting
from workers.engine.building import build_client
from workers.engine.request import EngineRequest
from workers.models.loading import with_local_base
from workers.threads import take_turns_often, usable_cpus

_LAST_WORDS_S = 10.0
"""So long after its engine has ended, a replica has passed on what the engine said last."""


def _node_cpus(node_id: str) -> float:
    """The CPUs Ray hands out on a node."""
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return float(node["Resources"].get("CPU", 0.0))


class EngineReplica:
    """One engine behind Serve. Requests come through `AdapterRouter`."""

    def __init__(self, settings: Settings, spec: PlacementSpec) -> None:
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._node_id = ray.get_runtime_context().get_node_id()
        self._host_bytes = settings.storage.host_bytes
        self._is_ending = False
        threads = replica_threads(
            settings, usable_cpus=usable_cpus(), node_cpus=_node_cpus(self._node_id)
        )
        engine = with_local_base(settings.engine, settings.storage)
        engine = engine.model_copy(update={"threads": threads})
        self._client = build_client(engine, partial(AdapterCache.open, settings.storage))
        self._streams = RequestStreams(self._client, self._replica_id)
        self._signals = LoadSignals(time.monotonic)
        take_turns_often()
        self._collecting = Collecting(time.monotonic)
        Heartbeat(spec, self._report, self._obey).start()

    async def generate(
        self, request: EngineRequest, avoided: str, is_whole: bool, reader: str
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        """See `RequestStreams.generate`. `avoided` is for `AdapterRouter`, which has read it by now."""
        async for batch in self._streams.generate(request, is_whole, reader):
            yield batch

    async def previews(self, wanted: PreviewsOf) -> PreviewStream:
        """See `RequestStreams.previews`; nothing when another replica was meant."""
        if wanted.replica_id == self._replica_id:
            async with aclosing(self._streams.previews(wanted.reader)) as stream:
                async for previews in stream:
                    yield previews

    async def ping(self) -> bool:
        return self._client.is_alive()

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if not self._client.is_alive():
            self._end_soon()
            raise RuntimeError("the engine is gone or stuck")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every `autoscaling.report_s`, for `ScalingPolicy`. Nothing from an engine that is gone."""
        if not self._client.is_alive():
            return {}
        return self._signals.read(self._client.load()).as_stats()

    def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.stop()

    def _end_soon(self) -> None:
        """Serve would wait for requests that nobody works on, as long as the longest may take."""
        if not self._is_ending:
            self._is_ending = True
            threading.Timer(_LAST_WORDS_S, os._exit, [1]).start()

    def _report(self) -> ReplicaReport | None:
        if not self._client.is_alive():
            return None
        load = self._client.load()
        self._collecting.settle_if_due(load.loads)
        return ReplicaReport(
            replica_id=self._replica_id,
            node_id=self._node_id,
            rows=load.bank_rows,
            num_bytes=self._host_bytes,
            device=load.device,
            host=load.host,
            disk=load.disk,
            work=load.work,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            loads=load.loads,
            evictions=load.evictions,
            rows_used=load.bank_rows_used,
            tokens_out=load.tokens_out,
            threads=load.threads,
            load_wait_s=load.load_wait_s,
            slots=load.kv_slots,
            load_s=load.load_s,
            failed=load.failed,
            is_registry_up=load.is_registry_up,
            kv_used=load.kv_used,
            misses=load.misses,
            queued_work=load.queued_work,
            first_token_p99_s=load.first_token_p99_s,
            figures=replica_figures(load),
        )

    def _obey(self, orders: ReplicaOrders) -> None:
        self._client.prefetch(orders.wanted, orders.pinned, orders.near, orders.retired)
