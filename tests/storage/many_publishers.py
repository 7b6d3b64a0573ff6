"""Many processes publish many versions to the same names at once, and nothing is lost.

    python -m tests.storage.many_publishers                    16 processes, 50 versions each, on an S3 API over HTTP
    python -m tests.storage.many_publishers --settings JSON    on the registry of these `StorageSettings`

Prints one line of JSON; ends with an AssertionError when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import boto3

from storage.config import StorageSettings
from storage.identity import AdapterName
from storage.index import reconcile
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.s3_server import s3_server
from tests.storage.versions import assert_whole, publish, version_of


def names(count: int) -> list[AdapterName]:
    return [AdapterName("team", f"shared-{number}") for number in range(count)]


def text_of(publisher: int, number: int) -> str:
    return f"{publisher}/{number}"


def publisher(number: int, versions: int, num_names: int, start: Connection) -> None:
    """Publishes its versions to every name in turn, as soon as it is told where."""
    settings = StorageSettings.model_validate_json(start.recv())
    registry = Registry(open_store(settings))
    for step in range(versions):
        name = names(num_names)[step % num_names]
        before = registry.generation()
        publish(registry, text_of(number, step), name=name)
        assert registry.generation() > before


def check(settings: StorageSettings, processes: int, versions: int, num_names: int) -> None:
    """Every version is readable, every alias has one line of history, and the index is the truth."""
    store = open_store(settings)
    registry = Registry(store)
    listed = registry.list()
    for place, name in enumerate(names(num_names)):
        expected = {
            version_of(text_of(number, step))
            for number in range(processes)
            for step in range(place, versions, num_names)
        }
        assert {manifest.version for manifest in registry.versions(name)} == expected
        for version in expected:
            assert_whole(registry, name, version)
        latest = registry.aliases(name)["latest"]
        assert latest.generation == len(expected), "a move was lost or taken twice"
        moves = latest.moves
        generations = [move.generation for move in moves]
        assert generations == list(range(latest.generation, 0, -1))[: len(moves)]
        assert all(move.version in expected for move in moves)
        entry = listed[name]
        assert {summary.version for summary in entry.versions} == expected
        assert entry.aliases["latest"].generation == latest.generation
        assert entry.aliases["latest"].version == latest.version
    assert reconcile(store, anew=True) == [], "the index is not what the records say"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--versions", type=int, default=50)
    parser.add_argument("--names", type=int, default=4)
    parser.add_argument("--settings", help="JSON of StorageSettings; default: an S3 API of its own")
    options = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
    fork = multiprocessing.get_context("fork")
    workers = []
    # Before any thread is started: a fork takes no threads along, only the locks they hold.
    for number in range(options.processes):
        theirs, ours = fork.Pipe(duplex=False)
        arguments = (number, options.versions, options.names, theirs)
        worker = fork.Process(target=publisher, args=arguments)
        worker.start()
        workers.append((worker, ours))
    with s3_server() if options.settings is None else nullcontext() as server:
        if server is None:
            settings = StorageSettings.model_validate_json(options.settings)
        else:
            client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
            client.create_bucket(Bucket="many")
            settings = StorageSettings(
                registry="s3://many/flora",
                s3_endpoint_url=server.url,
                s3_timeout_s=300,  # one server and all its clients share this machine's cores
            )
        began = time.perf_counter()
        for _, ours in workers:
            ours.send(settings.model_dump_json())
        for worker, _ in workers:
            worker.join()
        seconds = time.perf_counter() - began
        assert [worker.exitcode for worker, _ in workers] == [0] * options.processes
        told: dict[str, Any] = {
            "processes": options.processes,
            "versions": options.processes * options.versions,
            "names": options.names,
            "seconds": round(seconds, 1),
        }
        if server is not None:
            told["requests"] = dict(Counter(server.requests))
        check(settings, options.processes, options.versions, options.names)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
