"""The engine's own process: `ProcessEngineClient` starts it as `python -m workers.engine.process_engine FD`.

An engine in a thread, and a pipe on which orders come and outputs and reports leave. It ends when it is told to, or
when the pipe ends because the process that started it is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

import torch

from storage.collecting import Collecting
from storage.errors import FloraError
from workers.engine.building import build_engine_apart
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
    portable,
)
from workers.engine.request import EngineRequest, FinishReason, RequestOutput, StepOutputs
from workers.engine.thread_client import ThreadEngineClient
from workers.threads import take_turns_often

# Twice per heartbeat of a replica.
REPORT_EVERY_S = 0.25
FLUSH_WITHIN_S = 5.0

_log = logging.getLogger(__name__)


class EngineProcess:
    """What this process is. `run` returns when it should end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._writer = PipeWriter(pipe)
        self._client: ThreadEngineClient | None = None
        self._is_over = threading.Event()

    def run(self) -> None:
        client = self._start()
        if client is not None:
            collecting = Collecting(time.monotonic)
            while client.is_running and not self._is_over.wait(REPORT_EVERY_S):
                load = client.load()
                collecting.settle_if_due(load.loads)
                if not self._writer.is_behind:
                    self._writer.put(Report(load, client.is_alive()))
            client.stop()
        self._writer.close(FLUSH_WITHIN_S)

    def _start(self) -> ThreadEngineClient | None:
        """The engine, stepping; None when it cannot be, and the other side was told why."""
        try:
            start: Start = self._pipe.recv()
            _log_to_stderr(start.log_level)
            # Before the model is loaded: that may take minutes, and nobody may be left to load it for.
            threading.Thread(target=self._obey, name="orders", daemon=True).start()
            tiers = start.make_tiers()
            engine = build_engine_apart(start.settings, tiers)
        except FloraError as error:
            self._writer.put(StartFailed(error))
            return None
        except Exception as error:
            _log.exception("the engine cannot start")
            said = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            self._writer.put(StartFailed(FloraError(f"the engine cannot start: {said}")))
            return None
        self._client = client = ThreadEngineClient(engine, tiers)
        client.start(lambda outputs: self._writer.put(portable(outputs)))
        self._writer.put(Ready(engine.limits, client.load()))
        return client

    def _obey(self) -> None:
        try:
            while not self._is_over.is_set():
                self._carry_out(self._pipe.recv())
        except GONE:
            if self._client is None:
                os._exit(1)
        finally:
            self._is_over.set()

    def _carry_out(self, order: object) -> None:
        client = self._client
        if isinstance(order, Stop) or client is None:
            self._is_over.set()
        elif isinstance(order, Submit):
            try:
                client.submit(order.request)
            except FloraError as error:
                self._writer.put(_refusal(order.request, error))
        elif isinstance(order, Abort):
            client.abort(order.request_id)
        elif isinstance(order, Prefetch):
            client.prefetch(order.wanted, order.pinned, order.near, order.retired)
        else:
            raise TypeError(f"no order: {order!r}")


def _refusal(request: EngineRequest, error: FloraError) -> StepOutputs:
    """What is owed for a request that came just when the engine ended."""
    last = RequestOutput(
        request.request_id, request.adapters, finish_reason=FinishReason.ERROR, error=error
    )
    return StepOutputs((last,))


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s %(name)s (engine {os.getpid()}): %(message)s",
    )


def main() -> None:
    # Ctrl-C reaches the whole terminal; who started us decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_interop_threads(1)  # nothing here runs two operators at once
    take_turns_often()
    exit_code = 1
    try:
        EngineProcess(Connection(int(sys.argv[1]))).run()
        exit_code = 0
    except BaseException:
        _log.exception("the engine's process ends")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the interpreter's own end: threads of ours may still be in the model.
        os._exit(exit_code)


if __name__ == "__main__":
    main()
