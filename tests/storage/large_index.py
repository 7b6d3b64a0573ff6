"""What it costs to list a large registry: as the first reader ever, as a new one, and after one publish.

    python -m tests.storage.large_index                      10,000 adapters in a directory
    python -m tests.storage.large_index --s3                 the same on an S3 API over HTTP
    python -m tests.storage.large_index --adapters 1000

Prints one line of JSON: seconds, and on S3 the requests of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.s3.models import s3_backends

from storage import layout
from storage.config import StorageSettings
from storage.identity import AdapterName
from storage.index import reconcile
from storage.manifest import AliasRecord, Manifest, Provenance
from storage.records import encode
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.s3_server import S3Server, s3_server
from tests.storage.versions import content_of, files_of, publish

_MOTO_ACCOUNT = "123456789012"


@contextmanager
def opened(is_s3: bool) -> Iterator[tuple[StorageSettings, S3Server | None]]:
    if not is_s3:
        with tempfile.TemporaryDirectory() as folder:
            yield StorageSettings(registry=folder), None
        return
    with s3_server() as server:
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
        client.create_bucket(Bucket="large")
        place = {"registry": "s3://large", "s3_endpoint_url": server.url}
        yield StorageSettings(**place, s3_timeout_s=300), server


def fill(put: Callable[[str, bytes], object], adapters: int) -> None:
    """The records of as many adapters, written as a copy of a registry writes them: without an index."""
    manifest = Manifest(content=content_of(files_of("same")), provenance=Provenance(created_s=1.0))
    alias = encode(AliasRecord(version=manifest.version, generation=1))
    for number in range(adapters):
        name = AdapterName("team", f"adapter-{number:05}")
        put(layout.manifest(name, manifest.version), encode(manifest))
        put(layout.alias(name, "latest"), alias)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
    os.fsync = lambda _: None  # filling a directory is not what is measured
    told: dict[str, Any] = {"adapters": options.adapters, "store": "s3" if options.s3 else "local"}
    with opened(options.s3) as (settings, server):
        store = open_store(settings)
        if server is None:
            fill(store.put, options.adapters)
        else:
            backend = s3_backends[_MOTO_ACCOUNT]["aws"]
            fill(lambda key, data: backend.put_object("large", key, data), options.adapters)

        def measure(step: str, do: Callable[[], object]) -> None:
            begin = 0 if server is None else len(server.requests)
            began, cpu = time.perf_counter(), time.process_time()
            do()
            told[step] = {
                "seconds": round(time.perf_counter() - began, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
            }
            if server is not None:
                told[step]["requests"] = dict(Counter(server.requests[begin:]))

        reader = Registry(store)
        measure("index made from the records", lambda: reconcile(store))
        measure("first list", reader.list)
        measure("list again", reader.list)
        measure(
            "publish", lambda: publish(reader, "new", name=AdapterName("team", "adapter-00007"))
        )
        measure("list after it", reader.list)
        measure("comparison of index and records", lambda: reconcile(store))
        assert len(reader.list()) == options.adapters
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
