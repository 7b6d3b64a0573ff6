"""A server without Ray: the real HTTP application and the real engine in this process, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import uvicorn

from cluster.key_store import KeyStore
from cluster.published import PublishedReader
from cluster.state import ClusterState
from cluster.view import TableView
from deployments.adapter_admin import AdapterAdmin
from deployments.adapter_sources import AdapterSources
from deployments.api import Api
from deployments.callers import Doorkeeper
from deployments.gateway import EngineGateway, ReplicaOutputs
from deployments.http_app import create_http_app
from deployments.last_good import LastGood
from deployments.metrics.exposition import Metrics
from deployments.model_list import ModelListReader
from deployments.model_names import ModelNames
from deployments.request_streams import RequestStreams
from deployments.text import TextCodec
from deployments.training_service import TrainingService
from deployments.upload import Uploads
from storage.adapter_cache import AdapterCache
from storage.stores import open_store
from tests.deployments.world import BASE_ID, LoneEngine, World, settings_for
from tests.training.service.desks import Cluster
from training.service.desk import Desk
from workers.engine.building import build_engine
from workers.engine.request import EngineRequest
from workers.engine.thread_client import ThreadEngineClient

POLL_S = 0.2
"""How often these servers look at the registry."""


@dataclass
class LocalGateway:
    """One engine in this process as the only replica."""

    streams: RequestStreams
    client: ThreadEngineClient
    is_up: bool = True

    def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        return self.streams.generate(request, is_whole)

    async def is_anyone_there(self) -> bool:
        return self.is_up


@dataclass
class LocalServer:
    url: str
    gateway: LocalGateway
    world: World
    codec: TextCodec
    alone: LoneEngine
    cluster: Cluster

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def local_server(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    settings = settings_for(tiny_llama_dir, tmp_path_factory.mktemp("local"))
    world = World.create(tiny_llama_dir, settings)
    alone = LoneEngine(world)
    cluster = Cluster(open_store(settings.storage))
    with local_replica(world) as gateway, served(world, gateway, cluster) as (url, api):
        yield LocalServer(url, gateway, world, api.codec, alone, cluster)
    alone.client.stop()


@contextmanager
def local_replica(world: World) -> Iterator[LocalGateway]:
    """An engine of the world's settings."""
    cache = AdapterCache(world.registry, world.settings.storage)
    client = ThreadEngineClient(build_engine(world.settings.engine, cache))
    try:
        yield LocalGateway(RequestStreams(client, "replica-here"), client)
    finally:
        client.stop()


@contextmanager
def served(
    world: World, gateway: EngineGateway, cluster: Cluster | None = None
) -> Iterator[tuple[str, Api]]:
    """The HTTP application over a registry, as an ingress wires it, but without a placement manager. Its URL."""
    settings = world.settings
    view = TableView(time.monotonic)
    reader = PublishedReader(world.registry)
    models = LastGood(ModelListReader(reader.read, BASE_ID).read, POLL_S, "model-list")
    keys = LastGood(KeyStore(open_store(settings.storage)).ring, POLL_S, "api-keys")

    async def no_manager() -> ClusterState:
        return ClusterState(view.table)

    training = training_service(world, cluster or Cluster(open_store(settings.storage)))
    api = Api(
        base_id=BASE_ID,
        created_s=1,
        request_timeout_s=60.0,
        replica_range=(1, 1),
        doorkeeper=Doorkeeper(keys, allows_anonymous=settings.serve.allow_anonymous),
        gateway=gateway,
        codec=TextCodec.open(settings.engine),
        names=ModelNames(
            view,
            world.registry,
            lambda: models.last.published if models.last else None,
            BASE_ID,
            table_ttl_s=30.0,
            on_news=lambda: None,
        ),
        view=view,
        models=models,
        admin=AdapterAdmin(
            world.registry,
            BASE_ID,
            lambda: world.base,
            AdapterSources(settings.serve.adapter_sources, settings.storage),
            models,
            on_change=lambda: None,
            max_bytes=settings.storage.max_adapter_bytes,
        ),
        uploads=Uploads(settings.storage.max_adapter_bytes),
        training=training,
        cluster_state=no_manager,
        metrics=Metrics(view),
    )
    models.follow()
    keys.follow()
    training.follow()
    try:
        with serving(create_http_app(api)) as url:
            yield url, api
    finally:
        models.stop()
        keys.stop()
        training.stop()


def training_service(world: World, cluster: Cluster) -> TrainingService:
    """With a desk whose jobs train when a test says so."""
    settings = world.settings
    store = open_store(settings.storage)
    return TrainingService(
        store,
        settings.training,
        BASE_ID,
        settings.engine.base,
        lambda: Desk(BASE_ID, lambda: world.base, store, cluster, settings.training, time.time),
    )


class serving:
    """`with serving(app) as url`: the app behind a real HTTP server in a thread."""

    def __init__(self, app: object) -> None:
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
