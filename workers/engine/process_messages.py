"""What crosses the pipe between a replica and its engine's process, in both directions. Plain frozen data."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from storage.errors import FloraError
from storage.identity import AdapterVersion
from workers.bank.source import AdapterTiers
from workers.config import EngineSettings
from workers.engine.client import EngineLoad
from workers.engine.request import EngineRequest, StepOutputs
from workers.engine.validation import RequestLimits

_log = logging.getLogger(__name__)

# To the engine's process.


@dataclass(frozen=True, slots=True)
class Start:
    """The first message. `make_tiers` is called in the engine's process, so only it must be picklable."""

    settings: EngineSettings
    make_tiers: Callable[[], AdapterTiers]
    log_level: int


@dataclass(frozen=True, slots=True)
class Submit:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    wanted: tuple[AdapterVersion, ...]
    pinned: frozenset[AdapterVersion]
    near: tuple[AdapterVersion, ...]
    retired: frozenset[AdapterVersion]


@dataclass(frozen=True, slots=True)
class Stop:
    pass


# From the engine's process.


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine steps from now on."""

    limits: RequestLimits
    load: EngineLoad


@dataclass(frozen=True, slots=True)
class StartFailed:
    error: FloraError


@dataclass(frozen=True, slots=True)
class Report:
    """Sent every so often, whatever the engine does; a process that sends none is stuck."""

    load: EngineLoad
    is_alive: bool


def portable(outputs: StepOutputs) -> StepOutputs:
    """The same outputs; an error that is not ours, and may not survive the pipe, becomes one that is."""
    if all(one.error is None or isinstance(one.error, FloraError) for one in outputs.outputs):
        return outputs
    error = FloraError("the engine failed; its log says more")
    return replace(
        outputs,
        outputs=tuple(
            one
            if one.error is None or isinstance(one.error, FloraError)
            else replace(one, error=error)
            for one in outputs.outputs
        ),
    )


GONE = (EOFError, OSError, pickle.UnpicklingError)
"""What reading a pipe raises whose other side has ended, perhaps in the middle of a message."""


class PipeWriter:
    """Sends messages in order from a thread of its own, so that nobody waits for the other side to read."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pipe-writer", daemon=True)
        self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Messages wait that the other side has no room for yet."""
        return not self._messages.empty()

    def put(self, message: object) -> None:
        """Send it as soon as may be. Lost without a word when the other side is gone: its reader will know."""
        self._messages.put(message)

    def close(self, within_s: float) -> None:
        """Send what was put so far, and end."""
        self._messages.put(None)
        self._thread.join(within_s)

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._pipe.send(message)
            except OSError:
                return  # the other side is gone: nobody is left to tell
            except Exception:
                _log.exception("a message cannot be sent; the connection ends")
                self._pipe.close()
                return
