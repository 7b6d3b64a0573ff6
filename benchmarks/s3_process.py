"""A real S3 API over HTTP, in a process of its own: moto's server, with one bucket.

`python -m benchmarks.s3_process PORT` is that process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import httpx
import psutil

BUCKET = "adapters"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
_STARTS_WITHIN_S = 60.0

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class S3Process:
    """A running server; what speaks to it needs `CREDENTIALS` in its environment."""

    url: str
    pid: int

    @property
    def cpu_s(self) -> float:
        """CPU seconds it has used."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def s3_process() -> Iterator[S3Process]:
    """Raises TimeoutError when it does not answer within a minute."""
    os.environ.update(CREDENTIALS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.s3_process", str(port)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield S3Process(url, server.pid)
    finally:
        server.terminate()
        server.wait()


def _wait_for(url: str) -> None:
    deadline_s = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            httpx.get(url, timeout=5)
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError("the S3 server does not answer")


class _InTurn:
    """S3 decides each conditional write atomically; moto looks and then writes, so its requests take turns."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._turn = threading.Lock()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        with self._turn:
            return list(self._application(environ, start_response))


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: object) -> None:
            pass

    application = _InTurn(DomainDispatcherApplication(create_backend_app))
    make_server(
        "127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=Quiet
    ).serve_forever()


if __name__ == "__main__":
    main()
