"""Streamed answers on their way: one stream for each ingress and replica, however many requests there are.

A request's own call brings its first outputs and, when it has ended, all the others. What the engine's steps bring
meanwhile travels here, so that a step is one message for all requests of an ingress; while nobody reads here, it
travels with the call. A preview may come late, or not at all: the call has everything, and nothing is taken out of
order. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field

from storage.errors import OverloadedError
from workers.engine.request import RequestOutput

IDLE_S = 2.0
"""A stream without requests ends after so long, so that it does not keep a replica that is to leave."""
AGAIN_S = 0.2
"""A stream that ended, or could not be opened because the replica is full, is opened again after so long."""


@dataclass(frozen=True, slots=True)
class Preview:
    """An output of a running request. `index` counts the request's outputs from 0."""

    index: int
    output: RequestOutput


PreviewStream = AsyncGenerator[tuple[Preview, ...], None]


class PreviewBox:
    """A replica's side: what one ingress has not fetched yet. One event loop."""

    def __init__(self) -> None:
        self._unread: dict[str, list[Preview]] = {}
        self._requests: set[str] = set()
        self._arrived = asyncio.Event()
        self._num_readers = 0

    @property
    def is_idle(self) -> bool:
        return not self._requests and not self._num_readers

    @property
    def is_read(self) -> bool:
        return self._num_readers > 0

    def open(self, request_id: str) -> None:
        self._requests.add(request_id)

    def put(self, preview: Preview) -> None:
        self._unread.setdefault(preview.output.request_id, []).append(preview)
        self._arrived.set()

    def close(self, request_id: str) -> None:
        """The request has ended; what is unread of it comes with its call. No error when it was never opened."""
        self._requests.discard(request_id)
        self._unread.pop(request_id, None)

    async def stream(self) -> PreviewStream:
        """What comes, until nothing is to be expected any more."""
        self._num_readers += 1
        try:
            while True:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._arrived.wait()
                except TimeoutError:
                    if not self._requests:
                        return
                    continue
                self._arrived.clear()
                unread, self._unread = self._unread, {}
                if unread:
                    yield tuple(preview for previews in unread.values() for preview in previews)
        finally:
            self._num_readers -= 1


@dataclass(slots=True)
class Listener:
    """An ingress's side of one request: puts what previews and the call bring into one order. One event loop."""

    replica_id: str = ""  # once the call has said it
    _num_taken: int = 0
    _num_from_call: int = 0
    _previews: dict[int, RequestOutput] = field(default_factory=dict)  # by index, not taken yet
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, preview: Preview) -> None:
        """One that is ahead of others waits for them: they are on their way, here or with the call."""
        if preview.index >= self._num_taken:
            self._previews[preview.index] = preview.output
            self._woken.set()

    def wake(self) -> None:
        """Have `take` return, whether there is anything or not."""
        self._woken.set()

    async def take(self) -> tuple[RequestOutput, ...]:
        """The next outputs, in their order, as soon as there are any; nothing when woken for another reason."""
        await self._woken.wait()
        self._woken.clear()
        outputs = []
        while self._num_taken in self._previews:
            outputs.append(self._previews.pop(self._num_taken))
            self._num_taken += 1
        return tuple(outputs)

    def take_from_call(self, outputs: tuple[RequestOutput, ...]) -> tuple[RequestOutput, ...]:
        """What is new in the call's next batch."""
        new = outputs[max(0, self._num_taken - self._num_from_call) :]
        self._num_from_call += len(outputs)
        for index in range(self._num_taken, self._num_from_call):
            self._previews.pop(index, None)
        self._num_taken = max(self._num_taken, self._num_from_call)
        self._woken.set()  # for what has waited for these
        return new


class Previews:
    """An ingress's side: listens to a replica while there are requests for it to listen for. One event loop.

    Args:
        open_stream: to a replica, by its id. May end any time, or raise OverloadedError.
    """

    def __init__(self, open_stream: Callable[[str], PreviewStream]) -> None:
        self._open_stream = open_stream
        self._listeners: dict[str, Listener] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}

    @contextmanager
    def listen(self, request_id: str) -> Iterator[Listener]:
        """Keep what is heard of a request, of whichever replica, from before it begins."""
        listener = self._listeners[request_id] = Listener()
        try:
            yield listener
        finally:
            del self._listeners[request_id]

    def read(self, replica_id: str, listener: Listener) -> None:
        """The listener's request runs there: see to it that somebody reads. May be repeated."""
        listener.replica_id = replica_id
        if replica_id not in self._readers:
            # In a context of its own: it must not end with the request that happened to need it first.
            task = asyncio.get_running_loop().create_task(self._read(replica_id), context=Context())
            self._readers[replica_id] = task

    async def _read(self, replica_id: str) -> None:
        try:
            while self._is_listened_to(replica_id):
                # What has become of the replica, each request's own call finds out.
                with suppress(OverloadedError):
                    await self._read_once(replica_id)
                if self._is_listened_to(replica_id):
                    await asyncio.sleep(AGAIN_S)
        finally:
            del self._readers[replica_id]

    async def _read_once(self, replica_id: str) -> None:
        async with aclosing(self._open_stream(replica_id)) as stream:
            async for previews in stream:
                for preview in previews:
                    listener = self._listeners.get(preview.output.request_id)
                    if listener is not None:
                        listener.put(preview)

    def _is_listened_to(self, replica_id: str) -> bool:
        return any(one.replica_id == replica_id for one in self._listeners.values())
