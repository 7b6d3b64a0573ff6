"""`/v1/models` with ten thousand adapters answers in under 200 ms warm, whole and in pages, also while others publish.

The adapters' records lie in a real registry on disk; its index is made from them by the first reader, as after a
loss. The HTTP application runs in a process of its own behind a real HTTP server, without Ray; requests come one after
another over one connection. A page is 100 models.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.results_file import Row, print_rows, write_result
from storage import layout
from storage.config import StorageSettings
from storage.identity import DEFAULT_ALIAS, DEFAULT_TENANT, AdapterName, sha256_hex
from storage.manifest import AliasRecord, FileEntry, Manifest, ManifestContent, Provenance
from storage.object_store import ObjectStore
from storage.records import encode
from storage.registry import Registry
from storage.stores import open_store

BASE_ID = "base"
_PAGE = 100
_BAR_MS = 200.0
_WRITERS = 16
_PUBLISH_EVERY_S = 0.25


def write_records(store: ObjectStore, count: int) -> None:
    """What `count` publishes leave, but for blobs, which no list reads, and the index."""

    def write(number: int) -> None:
        name, manifest = _adapter(number)
        store.put(layout.manifest(name, manifest.version), encode(manifest))
        alias = AliasRecord(version=manifest.version, generation=1)
        store.put(layout.alias(name, DEFAULT_ALIAS), encode(alias))

    with ThreadPoolExecutor(_WRITERS) as threads:
        list(threads.map(write, range(count)))


def _adapter(number: int, edition: int = 0) -> tuple[AdapterName, Manifest]:
    data = _data(number, edition)
    manifest = Manifest(
        content=ManifestContent(
            files={
                "adapter_model.safetensors": FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
            },
            family="flora",
            ranks={f"model.layers.{layer}.self_attn.q_proj": 1 + number % 8 for layer in range(30)},
            dtype="bfloat16",
            base_digest=sha256_hex(b"base"),
        ),
        provenance=Provenance(created_s=1.7e9 + number, base_name=BASE_ID),
    )
    return AdapterName(DEFAULT_TENANT, f"adapter-{number:05d}"), manifest


def _data(number: int, edition: int) -> bytes:
    return f"adapter {number} edition {edition}".encode()


def serve(directory: Path, tell: Connection) -> None:
    """The HTTP application over a registry, for ever; tells its port, and how long its first reading took."""
    import uvicorn

    from cluster.keys import KeyRing
    from cluster.published import PublishedReader
    from cluster.view import TableView
    from deployments.api import Api
    from deployments.callers import Doorkeeper
    from deployments.http_app import create_http_app
    from deployments.last_good import LastGood
    from deployments.metrics.exposition import Metrics
    from deployments.model_list import ModelListReader
    from deployments.model_names import ModelNames

    registry = Registry(open_store(StorageSettings(registry=str(directory))))
    view = TableView(time.monotonic)
    models = LastGood(ModelListReader(PublishedReader(registry).read, BASE_ID).read, 1.0, "models")
    began = time.perf_counter()
    models.refresh()
    first_s = time.perf_counter() - began
    models.follow()
    unused: Any = None
    app = create_http_app(
        Api(
            base_id=BASE_ID,
            created_s=1,
            request_timeout_s=60.0,
            replica_range=(1, 1),
            doorkeeper=Doorkeeper(LastGood(KeyRing, 60.0, "keys"), allows_anonymous=True),
            gateway=unused,
            codec=unused,
            names=ModelNames(
                view,
                registry,
                lambda: models.last.published if models.last else None,
                BASE_ID,
                table_ttl_s=30.0,
                on_news=lambda: None,
            ),
            view=view,
            models=models,
            admin=unused,
            uploads=unused,
            training=unused,
            cluster_state=unused,
            metrics=Metrics(view),
        )
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))

    def tell_port() -> None:
        while not server.started:
            time.sleep(0.01)
        tell.send((server.servers[0].sockets[0].getsockname()[1], first_s))

    threading.Thread(target=tell_port, daemon=True).start()
    server.run()


@contextmanager
def served(directory: Path) -> Iterator[tuple[HTTPConnection, float]]:
    """A connection to the application, and the seconds of its first reading of the registry."""
    context = multiprocessing.get_context("spawn")
    hear, tell = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(directory, tell), daemon=True)
    process.start()
    try:
        port, first_s = hear.recv()
        yield HTTPConnection("127.0.0.1", port), first_s
    finally:
        process.terminate()
        process.join()


class Client:
    """Asks one thing at a time; times it from the request's first byte to the answer's last."""

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection

    def get(self, path: str) -> tuple[float, Any]:
        """Milliseconds, and the JSON that came; reading that is not timed."""
        began = time.perf_counter()
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        elapsed_ms = 1000 * (time.perf_counter() - began)
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {body[:200]!r}")
        return elapsed_ms, json.loads(body)

    def whole(self) -> float:
        return self.get("/v1/models")[0]

    def one(self, number: int) -> float:
        return self.get(f"/v1/models/adapter-{number:05d}@{_adapter(number)[1].version[:12]}")[0]

    def pages(self) -> list[float]:
        """Of every page of the list."""
        times, after = [], ""
        while True:
            elapsed_ms, page = self.get(f"/v1/models?limit={_PAGE}{after}")
            times.append(elapsed_ms)
            if not page["has_more"]:
                return times
            after = f"&after={page['last_id']}"


@contextmanager
def publishing(registry: Registry, count: int) -> Iterator[None]:
    """Somebody else publishes new versions all the while."""
    stopped = threading.Event()

    def publish() -> None:
        edition = 0
        while not stopped.wait(_PUBLISH_EVERY_S):
            edition += 1
            number = edition * 7919 % count
            name, manifest = _adapter(number, edition)
            files = dict.fromkeys(manifest.content.files, _data(number, edition))
            registry.publish(name, files, manifest.content, provenance=manifest.provenance)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def p99(times: list[float]) -> float:
    return quantiles(times, n=100, method="inclusive")[-1]


def measure(rounds: int, requests: int, ask: Callable[[], list[float]]) -> list[list[float]]:
    """Each round's times, once everything is warm."""
    ask()
    return [[ms for _ in range(requests) for ms in ask()] for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=50, help="Whole lists in a round.")
    arguments = parser.parse_args()
    count = arguments.adapters

    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        store = open_store(StorageSettings(registry=place))
        write_records(store, count)
        with served(directory) as (connection, first_s):
            client = Client(connection)
            body = client.get("/v1/models")[1]
            assert len(body["data"]) == count + 1
            num_bytes = len(json.dumps(body))
            asked = {
                "whole list": lambda: [client.whole()],
                "one page": client.pages,
                "one model": lambda: [
                    client.one(number) for number in range(0, count, count // 10)
                ],
            }
            times = {
                what: measure(
                    arguments.rounds, 1 if what == "one page" else arguments.requests, ask
                )
                for what, ask in asked.items()
            }
            with publishing(Registry(store), count):
                times["whole list while others publish"] = measure(
                    arguments.rounds, arguments.requests, asked["whole list"]
                )
    rows = [
        Row("first reading of the registry, index made anew, seconds", (first_s,), better="lower")
    ]
    for what, found in times.items():
        rows += [
            Row(f"{what}: p50, ms", tuple(map(median, found)), _BAR_MS, "lower"),
            Row(f"{what}: p99, ms", tuple(map(p99, found)), _BAR_MS, "lower"),
        ]
    print_rows(rows)
    workload = {
        "adapters": count,
        "models in a page": _PAGE,
        "bytes of the whole list": num_bytes,
        "requests in a round": arguments.requests,
        "seconds between publishes of others": _PUBLISH_EVERY_S,
    }
    claim = (
        f"/v1/models with {count:,} adapters answers in under {_BAR_MS:g} ms, whole and in pages"
    )
    print(write_result("models_list", claim, rows, seed=0, workload=workload))


if __name__ == "__main__":
    main()
