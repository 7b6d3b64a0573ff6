"""Which requests are still owed their last output: the book behind "exactly one", for every transport."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from storage.errors import EngineLostError, InvalidRequestError
from storage.identity import AdapterSet
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, StepOutputs

_log = logging.getLogger(__name__)


def engine_lost() -> EngineLostError:
    """Why a request ends with its engine, whether that stopped or died: another one may answer."""
    return EngineLostError("the engine that had the request has ended; it may be sent again")


class OwedAnswers:
    """Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapters: dict[str, AdapterSet] = {}
        self._on_step: Callable[[StepOutputs], None] | None = None

    def deliver_to(self, on_step: Callable[[StepOutputs], None]) -> None:
        """Hand outputs out to `on_step` from now on."""
        self._on_step = on_step

    @property
    def is_delivered(self) -> bool:
        """There is somebody who takes outputs."""
        return self._on_step is not None

    def add(self, request: EngineRequest) -> None:
        """From now on this request is owed an end. Raises InvalidRequestError if its id is in use."""
        with self._lock:
            if request.request_id in self._adapters:
                raise InvalidRequestError(f"request id {request.request_id} is in use")
            self._adapters[request.request_id] = request.adapters

    def hand_out(self, outputs: StepOutputs) -> None:
        """Hand outputs out, and strike out the requests that end with them."""
        if not outputs.outputs or self._on_step is None:
            return
        with self._lock:
            for output in outputs.outputs:
                if output.finish_reason is not None:
                    self._adapters.pop(output.request_id, None)
        try:
            self._on_step(outputs)
        except Exception:
            # A receiver's error is not the engine's: other requests go on.
            _log.exception("handing out a step's outputs failed")

    def end_all(self) -> None:
        """Hand out a last output, `engine_lost`, for everybody who is still owed one; afterwards nobody is."""
        error = engine_lost()
        with self._lock:
            adapters = dict(self._adapters)
        self.hand_out(
            StepOutputs(
                tuple(
                    RequestOutput(request_id, one, finish_reason=FinishReason.ERROR, error=error)
                    for request_id, one in adapters.items()
                )
            )
        )
