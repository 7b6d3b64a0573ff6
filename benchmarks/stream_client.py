"""Streamed completions with the time of every event, from as lean a client as there is.

What events say is looked at when the stream is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_ANSWER_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Streamed:
    """One request. Times are `time.perf_counter()`'s."""

    adapter: str
    sent_s: float
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    event_s: tuple[float, ...] = ()  # of events that bring text, and of the last one
    tokens: int = 0
    error: str = ""  # why it is no whole answer

    @property
    def is_whole(self) -> bool:
        return not self.error

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first event."""
        return self.event_s[0] - self.sent_s

    @property
    def inter_token_s(self) -> float:
        return (self.event_s[-1] - self.event_s[0]) / (self.tokens - 1)

    @property
    def tier(self) -> str:
        return self.headers.get("x-adapter-tier", "none")

    @property
    def queue_s(self) -> float:
        """What it waited in the replica, as the replica says."""
        return float(self.headers.get("x-queue-time-ms", "nan")) / 1000


async def stream(
    url: str, model: str, prompt: list[int], answer_tokens: int, within_s: float = _ANSWER_WITHIN_S
) -> Streamed:
    """One greedy completion on a connection of its own. Never raises for what a server may do."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(within_s):
            status, headers, events = await _exchange(url, json.dumps(body).encode())
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        return Streamed(model, sent_s, error=f"{type(error).__name__}: {error}")
    return _read(Streamed(model, sent_s, status, headers), events, answer_tokens)


Event = tuple[float, bytes]


async def _exchange(url: str, body: bytes) -> tuple[int, dict[str, str], list[Event]]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {parts.hostname}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        events = []
        while line := await reader.readline():
            if line.startswith((b"data: ", b"{")):
                events.append((time.perf_counter(), line))
        return status, headers, events
    finally:
        writer.close()


def _read(answer: Streamed, events: list[Event], answer_tokens: int) -> Streamed:
    def failed(why: str) -> Streamed:
        return Streamed(answer.adapter, answer.sent_s, answer.status, answer.headers, error=why)

    if answer.status != 200:
        return failed(f"{answer.status}: {b' '.join(line for _, line in events)[:200]!r}")
    if not events or events[-1][1].strip() != b"data: [DONE]":
        return failed(f"the stream did not end: {events[-1:]!r}")
    read: list[tuple[float, dict[str, Any]]] = [
        (at_s, json.loads(line.removeprefix(b"data: "))) for at_s, line in events[:-1]
    ]
    usage: dict[str, int] = next(
        (each["usage"] for _, each in reversed(read) if each.get("usage")), {}
    )
    tokens = usage.get("completion_tokens", 0)
    if tokens != answer_tokens:
        return failed(f"{tokens} tokens instead of {answer_tokens}")
    event_s = tuple(at_s for at_s, each in read if each.get("choices"))
    return Streamed(answer.adapter, answer.sent_s, 200, answer.headers, event_s, tokens)
