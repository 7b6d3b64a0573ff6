"""Which requests are still owed their last output: the book behind "exactly one", for every transport."""

from __future__ import annotations

from storage.errors import EngineLostError, InvalidRequestError
from storage.identity import AdapterSet
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, StepOutputs


def engine_lost() -> EngineLostError:
    """Why a request ends with its engine, whether that stopped or died: another one may answer."""
    return EngineLostError("the engine that had the request has ended; it may be sent again")


class OwedAnswers:
    """Not thread-safe: its client's lock guards it."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterSet] = {}

    def add(self, request: EngineRequest) -> None:
        """From now on this request is owed an end. Raises InvalidRequestError if its id is in use."""
        if request.request_id in self._adapters:
            raise InvalidRequestError(f"request id {request.request_id} is in use")
        self._adapters[request.request_id] = request.adapters

    def settle(self, outputs: StepOutputs) -> None:
        """Strike out the requests that end with these outputs."""
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self._adapters.pop(output.request_id, None)

    def end_all(self) -> StepOutputs:
        """A last output, `engine_lost`, for everybody who is still owed one; afterwards nobody is."""
        error = engine_lost()
        adapters, self._adapters = self._adapters, {}
        return StepOutputs(
            tuple(
                RequestOutput(request_id, one, finish_reason=FinishReason.ERROR, error=error)
                for request_id, one in adapters.items()
            )
        )
