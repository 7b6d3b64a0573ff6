"""The ingress as a Serve deployment: reads the settings, opens the parts, hands them to the HTTP application."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from cluster.actor import PlacementSpec, connect
from cluster.published import Published, PublishedReader
from cluster.state import ClusterState
from deployments.api import Api
from deployments.gateway import ServeGateway
from deployments.http_app import create_http_app
from deployments.metrics.exposition import Metrics
from deployments.model_names import ModelNames
from deployments.settings import Settings
from deployments.table_poller import shared_view
from deployments.text import TextCodec
from storage.errors import OverloadedError, StoreUnavailableError
from storage.registry import Registry
from storage.stores import open_store
from workers.models.loading import with_local_base

_ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


def http_app_builder(
    settings: Settings, spec: PlacementSpec, engine_name: str
) -> Callable[[], FastAPI]:
    """What Serve calls in each ingress process to make its application."""

    def build() -> FastAPI:
        app_name = serve.get_replica_context().app_name
        view = shared_view(spec)
        registry = Registry(open_store(settings.storage))
        return create_http_app(
            Api(
                base_id=settings.engine.base_id,
                created_s=int(time.time()),
                request_timeout_s=settings.serve.request_timeout_s,
                allows_remote=not settings.serve.allow_anonymous,
                gateway=ServeGateway(serve.get_deployment_handle(engine_name, app_name)),
                codec=TextCodec.open(with_local_base(settings.engine, settings.storage)),
                names=ModelNames(
                    view,
                    registry,
                    settings.engine.base_id,
                    settings.cluster.table_ttl_s,
                    on_news=lambda: _nudge(spec),
                ),
                view=view,
                published=_last_good(PublishedReader(registry, time.monotonic)),
                cluster_state=lambda: _cluster_state(spec),
                metrics=Metrics(view),
            ),
            is_behind_serve=True,
        )

    return build


class Ingress:
    """Holds the engine's handle, which makes Serve deploy the engine with it; the HTTP application does the rest."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine


def _last_good(reader: PublishedReader) -> Callable[[], Published]:
    """Reads for many threads, one at a time. While the registry is away, what it said last stands."""
    lock = threading.Lock()
    last: Published | None = None

    def read() -> Published:
        nonlocal last
        with lock:
            try:
                last = reader.read()
            except StoreUnavailableError:
                if last is None:
                    raise
            return last

    return read


def _nudge(spec: PlacementSpec) -> None:
    try:
        connect(spec).nudge.remote()
    except (RayError, ValueError) as error:
        # It hears of the news at its next look at the registry.
        _log.warning("the placement manager cannot be told: %s", type(error).__name__)


async def _cluster_state(spec: PlacementSpec) -> ClusterState:
    def ask() -> ClusterState:
        state: ClusterState = ray.get(connect(spec).state.remote(), timeout=_ANSWER_TIMEOUT_S)
        return state

    try:
        return await asyncio.to_thread(ask)
    except (RayError, ValueError):
        raise OverloadedError(
            "the placement manager does not answer; it may be restarting"
        ) from None
