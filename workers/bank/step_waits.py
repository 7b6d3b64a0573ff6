"""How long the thread that steps waits for locks that loads hold too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepWaits:
    """One for a bank and its loader. Waits of other threads are not counted: they may."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self._stepping: int | None = None

    def step_here(self) -> None:
        """The calling thread is the one that steps from now on."""
        self._stepping = threading.get_ident()

    @contextmanager
    def holding(self, lock: threading.Lock | threading.Condition) -> Iterator[None]:
        """Hold the lock inside."""
        if not lock.acquire(blocking=False):
            began_s = time.perf_counter()
            lock.acquire()
            if self._stepping == threading.get_ident():
                self.wait_s += time.perf_counter() - began_s
        try:
            yield
        finally:
            lock.release()
