"""The leanest HTTP client there is, so that a benchmark measures the server: it writes requests and reads bytes.

What the bytes say is looked at after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from http.client import HTTPResponse
from io import BytesIO
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit


def post_all(url: str, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[str]]:
    """POST all bodies at once, each on a connection of its own.

    Returns:
        Seconds until the last response was complete, and the responses' texts in the order of the bodies.

    Raises:
        RuntimeError: a response is not 200; has its text.
    """
    parts = urlsplit(url)
    messages = [_message(parts.hostname or "", parts.path, json.dumps(body)) for body in bodies]
    seconds, answers = asyncio.run(_exchange(parts.hostname, parts.port, messages))
    return seconds, [_text(answer) for answer in answers]


def _message(host: str, path: str, body: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n"
    )
    return (head + body).encode()


async def _exchange(
    host: str | None, port: int | None, messages: Sequence[bytes]
) -> tuple[float, list[bytes]]:
    async def one(message: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(message)
            return await reader.read()
        finally:
            writer.close()

    began = time.perf_counter()
    answers = await asyncio.gather(*map(one, messages))
    return time.perf_counter() - began, list(answers)


class _Received:
    """What `HTTPResponse` wants of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> BinaryIO:
        return BytesIO(self._data)


def _text(answer: bytes) -> str:
    response = HTTPResponse(cast(Any, _Received(answer)))
    response.begin()
    text = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {text[:300]}")
    return text
