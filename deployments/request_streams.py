"""A replica's requests: each waits in its own inbox for what the engine's steps bring it. No Ray.

The engine speaks once per step, from its own thread; the replica's event loop hands each request its part.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from deployments.gateway import ReplicaOutputs
from deployments.previews import Preview, PreviewBox, PreviewStream
from storage.errors import FloraError
from workers.engine.client import EngineClient
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, StepOutputs


class _Inbox:
    """Outputs of one request that its call has not taken yet. The event loop's thread only.

    Args:
        is_whole: what comes between the first output and the last is taken with the last.
        box: shows what comes between them as long as it is read; then that is taken with the last as well.
    """

    def __init__(self, is_whole: bool, box: PreviewBox | None) -> None:
        self._is_whole = is_whole
        self._box = box
        self._outputs: list[RequestOutput] = []
        self._num_put = 0
        self._has_begun = False
        self._arrived = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        index = self._num_put
        self._num_put += 1
        self._outputs.append(output)
        if not self._has_begun or output.finish_reason is not None:
            self._arrived.set()
        elif self._box is not None and self._box.is_read:
            self._box.put(Preview(index, output))
        elif not self._is_whole:
            self._arrived.set()

    async def take(self) -> tuple[RequestOutput, ...]:
        """All that is there, at least one: a slow reader gets several steps at once."""
        await self._arrived.wait()
        self._arrived.clear()
        self._has_begun = True
        outputs, self._outputs = tuple(self._outputs), []
        return outputs


class RequestStreams:
    """Requests to an engine as async generators.

    Args:
        client: started here.
        replica_id: stamped on every batch.
    """

    def __init__(self, client: EngineClient, replica_id: str) -> None:
        self._client = client
        self._replica_id = replica_id
        self._inboxes: dict[str, _Inbox] = {}
        self._boxes: dict[str, PreviewBox] = {}  # by reader
        self._loop: asyncio.AbstractEventLoop | None = None
        client.start(self._on_step)

    async def generate(
        self, request: EngineRequest, is_whole: bool = False, reader: str = ""
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        """Run a request; the last batch has a finish reason. A refusal is an output too, never an exception.

        Closed or cancelled early, it aborts the request in the engine. One event loop for all requests.

        Args:
            is_whole: at most two batches: what came first, and all the rest.
            reader: who, while it reads `previews`, is shown there what comes between the first batch and the last.
        """
        self._loop = asyncio.get_running_loop()
        box = self._open_box(reader, request.request_id) if reader else None
        inbox = _Inbox(is_whole, box)
        is_over = True
        try:
            try:
                self._client.submit(request)
            except FloraError as error:
                yield self._batch(
                    RequestOutput(
                        request.request_id,
                        request.adapters,
                        finish_reason=FinishReason.ERROR,
                        error=error,
                    )
                )
                return
            # Before any await, so no step's output can be handed out in between.
            self._inboxes[request.request_id] = inbox
            is_over = False
            while not is_over:
                outputs = await inbox.take()
                is_over = outputs[-1].finish_reason is not None
                yield self._batch(*outputs)
        finally:
            if self._inboxes.get(request.request_id) is inbox:
                del self._inboxes[request.request_id]
            if not is_over:
                self._client.abort(request.request_id)
            if box is not None:
                box.close(request.request_id)
                self._tidy(reader)

    async def previews(self, reader: str) -> PreviewStream:
        """What comes for all requests of this reader, until there has been none for a while."""
        box = self._boxes.setdefault(reader, PreviewBox())
        try:
            async with aclosing(box.stream()) as stream:
                async for previews in stream:
                    yield previews
        finally:
            self._tidy(reader)

    def _open_box(self, reader: str, request_id: str) -> PreviewBox:
        box = self._boxes.setdefault(reader, PreviewBox())
        box.open(request_id)
        return box

    def _tidy(self, reader: str) -> None:
        """Forget a reader nobody reads as, and nothing is computed for."""
        box = self._boxes.get(reader)
        if box is not None and box.is_idle:
            del self._boxes[reader]

    def _batch(self, *outputs: RequestOutput) -> ReplicaOutputs:
        return ReplicaOutputs(self._replica_id, outputs)

    def _on_step(self, outputs: StepOutputs) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._hand_out, outputs)

    def _hand_out(self, outputs: StepOutputs) -> None:
        for output in outputs.outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:  # else its reader has gone
                inbox.put(output)
