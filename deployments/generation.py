"""One answer on its way to a client: engine outputs in, text out. Knows nothing of HTTP.

Text is decoded as it comes, stop strings end it, a lost replica is replaced while the client has seen nothing, and an
output that other adapters computed than were asked for ends the answer with an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from deployments.answer_text import AnswerText, Delta
from deployments.errors import RequestTimeoutError, WrongAdapterError
from deployments.gateway import EngineGateway, ReplicaOutputs
from deployments.text import PromptText, TextCodec
from storage.errors import EngineLostError, FloraError
from workers.engine.request import EngineRequest, FinishReason, RequestOutput


class Generation:
    """Drive with `start`, then either `deltas` or `text`; then `close`, whatever happened.

    Args:
        request: its id is unique in the cluster.
        stops: strings that end the answer and are not part of it.
        echo: what to show before the answer, if anything.
    """

    def __init__(
        self,
        gateway: EngineGateway,
        codec: TextCodec,
        request: EngineRequest,
        stops: Sequence[str],
        echo: PromptText | None = None,
    ) -> None:
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0  # of the prompt
        self.replica_id = ""
        self.adapter_tier: str | None = None
        self.queue_time_s = 0.0
        self._gateway = gateway
        self._codec = codec
        self._stops = stops
        self._echo = echo
        self._may_retry = True
        self._avoided = ""
        self._is_whole = False
        self._stream: AsyncGenerator[ReplicaOutputs, None] | None = None
        self._first: ReplicaOutputs | None = None

    async def start(self) -> None:
        """Wait for the first output, so a refusal is known before the response begins.

        Raises:
            FloraError: why there will be no answer.
        """
        while self._first is None:
            self._stream = self._gateway.generate(self.request, self._avoided, self._is_whole)
            try:
                # The engine keeps the deadline of what it has; here nobody may have it yet.
                async with asyncio.timeout(self._seconds_left()):
                    first = await anext(self._stream, None)
                if first is None:
                    raise FloraError("the engine gave no answer")
                self.replica_id = first.replica_id
                _check_adapters(self.request, first)
                # A batch may be several steps: nobody has seen any of them yet.
                for output in first.outputs:
                    _raise_refusal(output)
            except EngineLostError as error:
                self._retry_or_raise(error)
                continue
            except TimeoutError:
                raise RequestTimeoutError("no replica began an answer in time") from None
            self._first = first
        self.adapter_tier = self._first.outputs[0].adapter_tier
        self.queue_time_s = self._first.outputs[0].queue_time_s or 0.0
        self.num_cached_tokens = self._first.outputs[0].num_cached_tokens or 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. A replica lost once the client has seen a part of it is an error."""
        has_shown = False
        while True:
            answer = AnswerText(self._codec, self.request, self._stops, self._echo)
            try:
                async with aclosing(self._outputs()) as outputs:
                    async for output in outputs:
                        delta = answer.push(output)
                        self.num_tokens = answer.num_tokens
                        if not delta.is_empty:
                            has_shown = True
                            yield delta
                        if delta.finish_reason is not None:
                            return
            except EngineLostError as error:
                # The first token of a character shows nothing yet.
                if has_shown:
                    raise
                self._retry_or_raise(error)
                self.num_tokens = 0
                await self.start()

    async def text(self) -> Delta:
        """The whole answer. Nobody has seen anything yet, so a lost replica's work is done again elsewhere, once."""
        # A stop string is found here, and ends the engine's work: then every step counts.
        self._is_whole = not self._stops
        while True:
            try:
                await self.start()
                deltas = [delta async for delta in self.deltas()]
            except EngineLostError as error:
                self._retry_or_raise(error)
                self.num_tokens = 0
                continue
            return Delta(
                "".join(delta.text for delta in deltas),
                deltas[-1].finish_reason,
                tuple(token for delta in deltas for token in delta.tokens),
            )

    async def close(self) -> None:
        """Abort what is still running. May be repeated."""
        if self._stream is not None:
            await self._stream.aclose()

    def _seconds_left(self) -> float | None:
        deadline_s = self.request.deadline_s
        return None if deadline_s is None else max(0.0, deadline_s - time.time())

    def _retry_or_raise(self, error: EngineLostError) -> None:
        if not self._may_retry:
            raise error
        self._may_retry = False
        self._first = None
        self._avoided, self.replica_id = self.replica_id, ""
        # The replica may live on behind a broken connection, and knows the first id.
        self.request = replace(self.request, request_id=f"{self.request.request_id}-again")

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        assert self._first is not None and self._stream is not None, "start() comes first"
        async with aclosing(self._stream) as stream:
            for output in self._first.outputs:
                yield output
            async for batch in stream:
                _check_adapters(self.request, batch)
                for output in batch.outputs:
                    _raise_refusal(output)
                    yield output
        raise FloraError("the engine's answer ended early")


def _check_adapters(request: EngineRequest, batch: ReplicaOutputs) -> None:
    for output in batch.outputs:
        if output.adapters != request.adapters:
            raise WrongAdapterError(
                "the answer was computed with other adapters than were asked for; it is withheld"
            )


def _raise_refusal(output: RequestOutput) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise output.error or FloraError("the engine could not answer")
    if output.finish_reason is FinishReason.ABORT:
        raise RequestTimeoutError("the answer was not finished in time")
