"""Streamed answers on their way: one stream for each ingress and replica, however many requests there are.

A request's own call brings its first outputs and, when it has ended, all the others. What the engine's steps bring
meanwhile travels here, so that a step is one message for all requests of an ingress. A preview may come late, or not
at all: the call has everything, and nothing is taken out of order. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
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
    """An output of a running request. `index` counts from its first output that its call has not brought yet."""

    index: int
    output: RequestOutput


PreviewStream = AsyncGenerator[tuple[Preview, ...], None]


class PreviewBox:
    """A replica's side: what one ingress has not fetched yet. One event loop."""

    def __init__(self) -> None:
        self._unread: dict[str, list[Preview]] = {}
        self._requests: dict[str, int] = {}  # → its next index
        self._arrived = asyncio.Event()
        self._num_readers = 0

    @property
    def is_idle(self) -> bool:
        return not self._requests and not self._num_readers

    def open(self, request_id: str) -> None:
        self._requests[request_id] = 0

    def put(self, output: RequestOutput) -> None:
        index = self._requests[output.request_id]
        self._requests[output.request_id] += 1
        self._unread.setdefault(output.request_id, []).append(Preview(index, output))
        self._arrived.set()

    def close(self, request_id: str) -> None:
        """The request has ended; what is unread of it comes with its call. No error when it was never opened."""
        self._requests.pop(request_id, None)
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
    """An ingress's side of one request. One event loop."""

    replica_id: str
    num_taken: int = 0
    _outputs: list[RequestOutput] = field(default_factory=list)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, preview: Preview) -> None:
        if preview.index == self.num_taken + len(self._outputs):  # else one before it was lost
            self._outputs.append(preview.output)
            self._woken.set()

    def wake(self) -> None:
        """Have `take` return, whether there is anything or not."""
        self._woken.set()

    async def take(self) -> tuple[RequestOutput, ...]:
        """The next outputs, in their order, as soon as there are any; nothing when woken for another reason."""
        await self._woken.wait()
        self._woken.clear()
        outputs, self._outputs = tuple(self._outputs), []
        self.num_taken += len(outputs)
        return outputs


class Previews:
    """An ingress's side: listens to a replica while there are requests for it to listen for. One event loop.

    Args:
        open_stream: to a replica, by its id. May end any time, or raise OverloadedError.
    """

    def __init__(self, open_stream: Callable[[str], PreviewStream]) -> None:
        self._open_stream = open_stream
        self._listeners: dict[str, Listener] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}

    def listen(self, replica_id: str, request_id: str) -> Listener:
        """Until `forget`."""
        listener = self._listeners[request_id] = Listener(replica_id)
        if replica_id not in self._readers:
            # In a context of its own: it must not end with the request that happened to need it first.
            task = asyncio.get_running_loop().create_task(self._read(replica_id), context=Context())
            self._readers[replica_id] = task
        return listener

    def forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)

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
