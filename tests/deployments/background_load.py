"""Clients that ask again and again, while a test breaks something."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class BackgroundLoad:
    """`with BackgroundLoad(8, ask) as load:` — eight threads that call `ask(0)`, `ask(1)`, … until the block ends.

    An exception of `ask` ends its thread and is raised when the block ends; nothing is asked twice.
    """

    def __init__(self, num_clients: int, ask: Callable[[int], None]) -> None:
        self._ask = ask
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._errors: list[Exception] = []
        self.num_answered = 0
        self._threads = [threading.Thread(target=self._run) for _ in range(num_clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        # Also where the block failed: most often for want of the threads that ended.
        if self._errors:
            raise self._errors[0] from error

    def check(self) -> None:
        """Raise now what went wrong so far."""
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._ask(next(self._numbers))
                with self._lock:
                    self.num_answered += 1
        except Exception as error:
            self._errors.append(error)
