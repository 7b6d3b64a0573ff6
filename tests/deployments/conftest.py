"""A server without Ray: the real HTTP application and the real engine in this process, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import uvicorn

from cluster.published import PublishedReader
from cluster.state import ClusterState
from cluster.view import TableView
from deployments.api import Api
from deployments.gateway import ReplicaOutputs
from deployments.http_app import create_http_app
from deployments.metrics.exposition import Metrics
from deployments.model_names import ModelNames
from deployments.request_streams import RequestStreams
from deployments.text import TextCodec
from storage.adapter_cache import AdapterCache
from tests.deployments.world import BASE_ID, LoneEngine, World, settings_for
from workers.engine.building import build_engine
from workers.engine.request import EngineRequest
from workers.engine.thread_client import ThreadEngineClient


@dataclass
class LocalGateway:
    """One engine in this process as the only replica."""

    streams: RequestStreams
    client: ThreadEngineClient
    is_up: bool = True

    def generate(
        self, request: EngineRequest, avoided: str = ""
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        return self.streams.generate(request)

    async def is_anyone_there(self) -> bool:
        return self.is_up


@dataclass
class LocalServer:
    url: str
    gateway: LocalGateway
    world: World
    codec: TextCodec
    alone: LoneEngine

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def local_server(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    settings = settings_for(tiny_llama_dir, tmp_path_factory.mktemp("local"))
    world = World.create(tiny_llama_dir, settings)
    cache = AdapterCache(world.registry, settings.storage)
    client = ThreadEngineClient(build_engine(settings.engine, cache.get))
    gateway = LocalGateway(RequestStreams(client, "replica-here"), client)
    view = TableView(time.monotonic)
    codec = TextCodec.open(settings.engine)

    async def no_manager() -> ClusterState:
        return ClusterState(view.table)

    app = create_http_app(
        Api(
            base_id=BASE_ID,
            created_s=1,
            request_timeout_s=60.0,
            allows_remote=False,
            gateway=gateway,
            codec=codec,
            names=ModelNames(view, world.registry, BASE_ID, table_ttl_s=30.0, on_news=lambda: None),
            view=view,
            published=PublishedReader(world.registry, time.monotonic).read,
            cluster_state=no_manager,
            metrics=Metrics(view),
        )
    )
    alone = LoneEngine(world)
    with serving(app) as url:
        yield LocalServer(url, gateway, world, codec, alone)
    client.stop()
    alone.client.stop()


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
