"""The engine in a process of its own, behind `EngineClient`: its steps and this process never share a lock.

The child is a fresh interpreter that runs `workers.engine.process_engine`, never a fork, so any program may start one
and a GPU is touched by the child alone. One pipe joins the two. Each side learns of the other's end by the end of the
pipe: a child whose parent is gone ends by itself, and a parent whose child is gone answers for it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from storage.errors import EngineLostError, FloraError
from storage.identity import AdapterVersion
from workers.bank.source import AdapterTiers
from workers.config import EngineSettings
from workers.engine.client import EngineLoad
from workers.engine.owed import OwedAnswers
from workers.engine.process_messages import (
    GONE,
    Abort,
    PipeWriter,
    Prefetch,
    Ready,
    Report,
    Start,
    StartFailed,
    Stop,
    Submit,
)
from workers.engine.request import EngineRequest, StepOutputs
from workers.engine.validation import validate_request
from workers.large_pages import with_large_pages
from workers.threads import engine_threads

# The child ends its step and its loads within this, or is killed.
STOP_WITHIN_S = 15.0

_log = logging.getLogger(__name__)


class ProcessEngineClient:
    """An `EngineClient`. The child is started, and its model loaded, before the constructor returns.

    Args:
        make_tiers: called in the child to open its own adapter cache; must be picklable.
        clock: what a stuck child is noticed by, in seconds.

    Raises:
        FloraError: what the engine's start raised, or that its process ended during it.
    """

    def __init__(
        self,
        settings: EngineSettings,
        make_tiers: Callable[[], AdapterTiers],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._owed = OwedAnswers()
        self._is_stopping = False
        self._is_gone = False
        self._pipe, theirs = Pipe()
        self._process = _spawn(theirs, settings)
        try:
            ready = self._begin(make_tiers)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            raise
        self._limits = ready.limits
        self._report = Report(ready.load, is_alive=True)
        self._heard_s = clock()
        self._writer = PipeWriter(self._pipe)
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The engine's process."""
        return self._process.pid

    def start(self, on_step: Callable[[StepOutputs], None]) -> None:
        self._owed.deliver_to(on_step)

    def submit(self, request: EngineRequest) -> None:
        """As `EngineClient.submit`.

        Raises:
            ContextLengthError, InvalidRequestError: it can never be answered, or its id is in use.
            EngineLostError: the engine is not started, stopping or dead.
        """
        validate_request(request, self._limits)
        with self._lock:
            if self._is_stopping or self._is_gone or not self._owed.is_delivered:
                raise EngineLostError("this replica is shutting down; send the request again")
            self._owed.add(request)
            # Within the lock, or an abort from another thread could overtake it.
            self._writer.put(Submit(request))

    def abort(self, request_id: str) -> None:
        self._writer.put(Abort(request_id))

    def prefetch(
        self,
        wanted: Sequence[AdapterVersion],
        pinned: frozenset[AdapterVersion],
        near: Sequence[AdapterVersion] = (),
        retired: frozenset[AdapterVersion] = frozenset(),
    ) -> None:
        self._writer.put(Prefetch(tuple(wanted), pinned, tuple(near), retired))

    def load(self) -> EngineLoad:
        """What the child last reported."""
        return self._report.load

    def is_alive(self) -> bool:
        is_silent = self._clock() - self._heard_s > self._settings.step_timeout_s
        is_over = self._is_gone or self._process.poll() is not None
        return self._report.is_alive and not is_silent and not is_over

    def stop(self) -> None:
        with self._lock:
            self._is_stopping = True
            self._writer.put(Stop())
        if threading.current_thread() is self._reader:
            return
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            _log.warning("the engine's process did not stop; it is killed")
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_WITHIN_S)
        self._writer.close(within_s=1.0)

    def _begin(self, make_tiers: Callable[[], AdapterTiers]) -> Ready:
        """Tell the child what to be, and wait until it is."""
        log_level = logging.getLogger().getEffectiveLevel()
        self._pipe.send(Start(self._settings, make_tiers, log_level))
        try:
            answer = self._pipe.recv()
        except GONE:
            code = self._process.wait()
            raise FloraError(f"the engine's process ended while starting, with {code}") from None
        if isinstance(answer, StartFailed):
            raise answer.error
        if not isinstance(answer, Ready):
            raise TypeError(f"the engine's process began with {answer!r}")
        return answer

    def _read(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                self._heard_s = self._clock()
                if isinstance(message, Report):
                    self._report = message
                elif isinstance(message, StepOutputs):
                    self._owed.hand_out(message)
        except GONE:
            pass
        except Exception:
            _log.exception("the engine's process says what cannot be read")
            self._process.kill()
        with self._lock:
            self._is_gone = True
        if not self._is_stopping:
            _log.error("the engine's process %d ended by itself", self.pid)
        self._owed.end_all()


def _spawn(pipe: Connection, settings: EngineSettings) -> subprocess.Popen[bytes]:
    """A child that holds the only open end of `pipe` besides ours. Its output goes where ours goes."""
    environment = with_large_pages(os.environ)
    # The child finds the same modules as we do, wherever we run.
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment["OMP_NUM_THREADS"] = str(engine_threads(settings.threads))
    command = [sys.executable, "-m", "workers.engine.process_engine", str(pipe.fileno())]
    try:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[pipe.fileno()]
        )
    finally:
        pipe.close()
