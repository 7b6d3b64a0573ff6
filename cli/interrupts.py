"""Being told to stop: Ctrl-C and a closed terminal end a command the same way, and cleaning up is not cut short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, so that whatever it started is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


@contextmanager
def shielded() -> Iterator[None]:
    """Ctrl-C has no effect inside: for stopping what was started. In the main thread only."""
    with kept_handlers():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        yield


@contextmanager
def kept_handlers() -> Iterator[None]:
    """What a library inside the block does to the signals of stopping is taken back after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: set by a library's own code, and not to be had back
                signal.signal(number, handler)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
