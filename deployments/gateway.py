"""The way from the ingress to an engine replica: one request in, batches of outputs back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError

from deployments.errors import ReplicaLostError
from storage.errors import FloraError, OverloadedError
from workers.engine.request import EngineRequest, RequestOutput

_PING_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class ReplicaOutputs:
    """What one replica added to one request since its last batch; the last one has a finish reason."""

    replica_id: str
    outputs: tuple[RequestOutput, ...]


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
        self._ping = handle.options(method_name="ping")

    async def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        # In a context of its own, so that Serve gives the call an id of its own: its router finds waiting calls by
        # the id of the HTTP request they belong to, and of several with one id it forgets all but the first.
        response = Context().run(self._generate.remote, request, avoided, is_whole)
        is_over = False
        try:
            async for batch in response:
                is_over = batch.outputs[-1].finish_reason is not None
                yield batch
            is_over = True
        except RequestCancelledError:
            raise asyncio.CancelledError from None
        except (RayError, RayServeException) as error:
            is_over = True
            raise _ours(error) from error
        finally:
            if not is_over:
                response.cancel()

    async def is_anyone_there(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._ping.remote(), _PING_TIMEOUT_S))
        except (TimeoutError, RayError, RayServeException):
            return False


def _ours(error: Exception) -> FloraError:
    """A Ray error as one of ours. What failed in the replica's own code stays an internal error."""
    if isinstance(error, BackPressureError):
        return OverloadedError("too many requests are waiting; try again in a moment")
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, FloraError) else FloraError("an engine replica failed")
    return ReplicaLostError("the replica that was answering is gone; send the request again")
