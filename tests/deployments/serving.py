"""The whole application on a real Ray, for tests that ask it over HTTP and compare with the engine alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from cli.local_cluster import LocalCluster
from deployments.launching import deploy, undeploy
from deployments.text import TextCodec
from storage.identity import AdapterVersion
from tests.deployments.world import BASE_ID, LoneEngine, World


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a client saw of one stream. `end`: `done`, the code of an error event, or empty when it just stopped."""

    status: int
    version: str | None
    text: str
    end: str


@dataclass
class Served:
    """The application under test, and the engine alone to compare with."""

    url: str
    world: World
    codec: TextCodec
    alone: LoneEngine
    ray: LocalCluster
    client: httpx.Client
    versions: dict[str, AdapterVersion | None] = field(default_factory=lambda: {BASE_ID: None})
    _known: dict[tuple[str, AdapterVersion | None, int], str] = field(default_factory=dict)

    def publish(self, name: str, rank: int, seed: int, family: str = "flora") -> AdapterVersion:
        version = self.world.publish(name, rank, seed, family)
        self.versions[name] = version
        return version

    def expected(self, prompt: str, version: AdapterVersion | None, max_tokens: int) -> str:
        """What the engine alone answers greedily."""
        key = (prompt, version, max_tokens)
        if key not in self._known:
            tokens = self.alone.answer(self.codec.encode(prompt), version, max_tokens)
            self._known[key] = self.codec.decode(tokens)
        return self._known[key]

    def complete(
        self, model: str, prompt: str, max_tokens: int = 8, **fields: Any
    ) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, **fields}
        return self.client.post(
            "/v1/completions", json={"temperature": 0, "ignore_eos": True, **body}
        )

    def stream(self, model: str, prompt: str, max_tokens: int = 8) -> Streamed:
        """The same as an event stream; any status is returned, not raised."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        text, end = "", ""
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                code: str = json.loads(response.read())["error"]["code"]
                return Streamed(response.status_code, None, "", code)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data.startswith("{"):
                    event = json.loads(data)
                    if "error" in event:
                        end = event["error"]["code"]
                    else:
                        text += event["choices"][0]["text"]
                elif data == "[DONE]":
                    end = "done"
            return Streamed(200, response.headers.get("x-adapter-version"), text, end)

    def is_right(self, response: httpx.Response, model: str, prompt: str, max_tokens: int) -> bool:
        """The answer is the model's own, and says so."""
        assert response.status_code == 200, response.text
        version = self.versions[model]
        text = response.json()["choices"][0]["text"]
        named: str | None = response.headers.get("x-adapter-version")
        return named == version and bool(text == self.expected(prompt, version, max_tokens))

    def state(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get("/v1/cluster").json()
        return answer

    def processes(self, of: str) -> list[psutil.Process]:
        """The processes of an actor class, by what Ray calls them."""
        found = []
        for process in psutil.Process(self.ray.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(of in word for word in process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def serve_world(world: World, cluster: LocalCluster) -> Iterator[Served]:
    """Deploy it, and take it off again."""
    alone = LoneEngine(world)
    try:
        url = deploy(world.settings)
        codec = TextCodec.open(world.settings.engine)
        with httpx.Client(base_url=url, timeout=120) as client:
            yield Served(url, world, codec, alone, cluster, client)
    finally:
        undeploy()
        alone.client.stop()


def until(condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {within_s} s"
        time.sleep(0.1)
