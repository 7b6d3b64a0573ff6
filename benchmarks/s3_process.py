"""A real S3 API over HTTP, in a process of its own: moto's server, with one bucket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3
import httpx
import psutil

BUCKET = "adapters"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
_STARTS_WITHIN_S = 60.0


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
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
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
