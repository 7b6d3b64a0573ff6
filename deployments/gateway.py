"""The way from the ingress to an engine replica: one request in, batches of outputs back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError

from cluster.failing_replicas import Outcome
from deployments.errors import ReplicaLostError
from deployments.outcomes import is_replicas_fault, outcome_of, shared_outcomes
from deployments.previews import Listener, Previews, PreviewStream
from storage.errors import FloraError, OverloadedError
from workers.engine.request import EngineRequest, RequestOutput

_PING_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class ReplicaOutputs:
    """What one replica added to one request since its last batch; the last one has a finish reason."""

    replica_id: str
    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class PreviewsOf:
    """A call for one replica and no other: an ingress wants to see its running requests there."""

    replica_id: str
    reader: str  # an ingress


class EngineGateway(Protocol):
    def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        """Send a request to the best replica. Closing the generator aborts the request there.

        Args:
            avoided: a replica to be tried last, because it has just failed this request.
            is_whole: nobody reads along: after the first batch the rest may come as one.

        Raises:
            ReplicaLostError: the replica is gone.
            OverloadedError: no replica takes the request.
        """

    async def is_anyone_there(self) -> bool:
        """Some replica answers within a few seconds."""


class ServeGateway:
    """`EngineGateway` over a Ray Serve deployment handle.

    Args:
        handle: of the engine deployment; its request router picks the replica.
    """

    def __init__(self, handle: Any) -> None:
        self._generate = handle.options(method_name="generate", stream=True)
        self._open_previews = handle.options(method_name="previews", stream=True)
        self._reader = uuid.uuid4().hex
        self._previews = Previews(self._previews_of)
        self._ping = handle.options(method_name="ping")

    async def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        # In a context of its own, so that Serve gives the call an id of its own: its router finds waiting calls by
        # the id of the HTTP request they belong to, and of several with one id it forgets all but the first.
        run = Context().run
        if is_whole:
            response = run(self._generate.remote, request, avoided, True, "")
            with _watched(response, request.request_id) as call:
                async for batch in response:
                    call.note(batch)
                    yield batch
                call.is_over = True
            return
        # Before the call, for what it begins may be shown before its own first batch is here.
        with self._previews.listen(request.request_id) as listener:
            response = run(self._generate.remote, request, avoided, False, self._reader)
            with _watched(response, request.request_id) as call:
                async with aclosing(self._read_along(response, listener)) as batches:
                    async for batch in batches:
                        call.note(batch)
                        yield batch
                call.is_over = True

    async def _read_along(
        self, response: Any, listener: Listener
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        """Each output once and in order, from the call or from previews, whichever has it first."""
        while True:
            call: asyncio.Future[ReplicaOutputs | None]
            call = asyncio.ensure_future(anext(response, None))
            call.add_done_callback(lambda _: listener.wake())
            try:
                while not call.done():
                    outputs = await listener.take()
                    if outputs:
                        yield ReplicaOutputs(listener.replica_id, outputs)
            finally:
                call.cancel()
            batch = call.result()
            if batch is None:
                return
            is_last = batch.outputs[-1].finish_reason is not None
            if not is_last:
                self._previews.read(batch.replica_id, listener)
            outputs = listener.take_from_call(batch.outputs)
            if outputs:
                yield ReplicaOutputs(batch.replica_id, outputs)
            if is_last:
                return

    async def _previews_of(self, replica_id: str) -> PreviewStream:
        response = self._open_previews.remote(PreviewsOf(replica_id, self._reader))
        with _watched(response) as call:
            async for previews in response:
                yield previews
            call.is_over = True

    async def is_anyone_there(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._ping.remote(), _PING_TIMEOUT_S))
        except (TimeoutError, RayError, RayServeException):
            return False


@dataclass(slots=True)
class _Call:
    request_id: str
    is_over: bool = False
    has_begun: bool = False

    def note(self, batch: ReplicaOutputs) -> None:
        """Tell the router what it must know of a batch."""
        outcome = outcome_of(batch.outputs[-1])
        self.is_over = batch.outputs[-1].finish_reason is not None
        if outcome is not None and (self.is_over or not self.has_begun):
            shared_outcomes().tell(self.request_id, outcome)
        self.has_begun = True


@contextmanager
def _watched(response: Any, request_id: str = "") -> Iterator[_Call]:
    """A call that is left before it is over is cancelled at the replica. Ray's errors become ours."""
    call = _Call(request_id)
    try:
        yield call
    except (RayError, RayServeException) as error:
        call.is_over = True
        ours = _ours(error)
        if isinstance(ours, FloraError) and is_replicas_fault(ours):
            shared_outcomes().tell(request_id, Outcome.FAILED)
        raise ours from error
    finally:
        shared_outcomes().forget(request_id)
        if not call.is_over:
            response.cancel()


def _ours(error: Exception) -> BaseException:
    """A Ray error as one of ours. What failed in the replica's own code stays an internal error."""
    if isinstance(error, RequestCancelledError):
        return asyncio.CancelledError()
    if isinstance(error, BackPressureError):
        return OverloadedError("too many requests are waiting; try again in a moment")
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, FloraError) else FloraError("an engine replica failed")
    return ReplicaLostError("the replica that was answering is gone; send the request again")
