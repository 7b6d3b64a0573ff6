"""What became of requests: from the gateway, which sees outputs, to the router, which Serve tells only of their ends.

Both are in one process, and may be on different event loops.
"""

from __future__ import annotations

import threading
from collections import deque

from cluster.failing_replicas import Outcome
from storage.errors import EngineLostError, FloraError
from workers.engine.request import FinishReason, RequestOutput

MAX_SENT = 10_000
MAX_UNHEARD = 10_000


class Heard:
    """What one router has not taken yet."""

    def __init__(self) -> None:
        self._unheard: deque[tuple[str, Outcome]] = deque(maxlen=MAX_UNHEARD)

    def put(self, replica_id: str, outcome: Outcome) -> None:
        self._unheard.append((replica_id, outcome))

    def take(self) -> list[tuple[str, Outcome]]:
        """Replica and outcome, the oldest first, each once."""
        return [self._unheard.popleft() for _ in range(len(self._unheard))]


class Outcomes:
    """Who has which request, and who is to hear of it. Any thread."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[str, Heard]] = {}
        self._lock = threading.Lock()

    def expect(self, request_id: str, replica_id: str, heard: Heard) -> None:
        """The replica has accepted the request."""
        with self._lock:
            self._sent[request_id] = (replica_id, heard)
            if len(self._sent) > MAX_SENT:  # nobody said how the oldest ended
                del self._sent[next(iter(self._sent))]

    def tell(self, request_id: str, outcome: Outcome) -> None:
        """Nothing happens for a request no router expects to hear of."""
        replica_id, heard = self._sent.get(request_id, (None, None))
        if replica_id is not None and heard is not None:
            heard.put(replica_id, outcome)

    def forget(self, request_id: str) -> None:
        """The request's call is over."""
        with self._lock:
            self._sent.pop(request_id, None)


_outcomes = Outcomes()


def shared_outcomes() -> Outcomes:
    """Those of this process, for all applications: request ids are unique in the cluster.

    Serve pickles the router's class with the objects its module names; a function is named, an object would be copied.
    """
    return _outcomes


def outcome_of(last: RequestOutput) -> Outcome | None:
    """What a request's latest output says of the replica; None when it says nothing."""
    if last.finish_reason is None:
        return Outcome.BEGUN
    if last.finish_reason is FinishReason.ABORT:
        return None
    if last.finish_reason is not FinishReason.ERROR:
        return Outcome.ANSWERED
    return Outcome.FAILED if is_replicas_fault(last.error) else None


def is_replicas_fault(error: BaseException | None) -> bool:
    """Whether another replica might have answered: not so when the request, its adapter or the registry is at fault."""
    if isinstance(error, FloraError):
        return type(error) is FloraError or isinstance(error, EngineLostError)
    return True
