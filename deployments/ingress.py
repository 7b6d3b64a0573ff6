"""The ingress as a Serve deployment: reads the settings, opens the parts, hands them to the HTTP application."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError

from cluster.actor import PlacementSpec, connect
from cluster.key_store import KeyStore
from cluster.published import PublishedReader
from cluster.state import ClusterState
from deployments.adapter_admin import AdapterAdmin
from deployments.adapter_sources import AdapterSources
from deployments.api import Api
from deployments.callers import Doorkeeper
from deployments.gateway import ServeGateway
from deployments.http_app import create_http_app
from deployments.last_good import LastGood
from deployments.metrics.exposition import Metrics
from deployments.model_list import ModelListReader
from deployments.model_names import ModelNames
from deployments.settings import Settings
from deployments.table_poller import shared_view
from deployments.text import TextCodec
from deployments.training_service import TrainingService
from deployments.upload import Uploads
from storage.base_checkpoint import read_base_facts
from storage.errors import OverloadedError
from storage.registry import Registry
from storage.stores import open_store_when_used
from training.backends import open_backend
from training.service.desk import Desk
from workers.models.loading import with_local_base

_ANSWER_TIMEOUT_S = 5.0
_KEYS_PERIOD_S = 5.0
"""A revoked key opens nothing after this long."""

_log = logging.getLogger(__name__)


def http_app_builder(
    settings: Settings, spec: PlacementSpec, engine_name: str
) -> Callable[[], FastAPI]:
    """What Serve calls in each ingress process to make its application."""

    def build() -> FastAPI:
        app_name = serve.get_replica_context().app_name
        view = shared_view(spec)
        store = open_store_when_used(settings.storage)
        registry = Registry(store)
        base_id = settings.engine.base_id
        models = LastGood(
            ModelListReader(PublishedReader(registry).read, base_id).read,
            settings.cluster.registry_poll_s,
            "model-list",
        )
        keys = LastGood(KeyStore(store).ring, _KEYS_PERIOD_S, "api-keys")
        for reading in (models, keys):
            reading.follow()
        engine = with_local_base(settings.engine, settings.storage)
        names = ModelNames(
            view,
            registry,
            lambda: models.last.published if models.last else None,
            base_id,
            settings.cluster.table_ttl_s,
            on_news=lambda: _nudge(spec),
        )
        admin = AdapterAdmin(
            registry,
            base_id,
            lambda: read_base_facts(Path(engine.base), base_id),
            AdapterSources(settings.serve.adapter_sources, settings.storage),
            models,
            on_change=lambda: _nudge(spec),
            max_bytes=settings.storage.max_adapter_bytes,
        )

        def on_published() -> None:
            admin.announce()
            names.forget()

        training = TrainingService(
            store,
            settings.training,
            base_id,
            settings.engine.base,
            lambda: Desk(
                base_id,
                lambda: read_base_facts(Path(engine.base), base_id),
                store,
                open_backend(settings, ray.get_runtime_context().gcs_address),
                settings.training,
                time.time,
                on_published,
            ),
        )
        training.follow()
        return create_http_app(
            Api(
                base_id=base_id,
                created_s=int(time.time()),
                request_timeout_s=settings.serve.request_timeout_s,
                replica_range=(settings.serve.min_replicas, settings.serve.max_replicas),
                doorkeeper=Doorkeeper(keys, allows_anonymous=settings.serve.allow_anonymous),
                gateway=ServeGateway(serve.get_deployment_handle(engine_name, app_name)),
                codec=TextCodec.open(engine),
                names=names,
                view=view,
                models=models,
                admin=admin,
                uploads=Uploads(settings.storage.max_adapter_bytes),
                training=training,
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
