"""Python's cycle collector in a process with many adapters: it stops every thread while it looks at all that lives.

In the manager, with ten thousand of them, and in a replica, with a model and a few hundred, that is hundreds of
thousands of objects: a tenth of a second or more, in which no answer goes on. Nearly all of them live for hours and end
by their reference counts, so they are set aside as soon as they are made, and only what is new is looked at. Cycles
among what was set aside are looked for now and then.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

THAW_S = 3600.0
LOADS_TOGETHER = 64
"""An adapter on the host is hundreds of objects; so many are set aside at a time."""


class Collecting:
    """For a process that is one service's alone: it sets aside the objects of everybody in it. Safe from any thread.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._thawed_s = clock()
        self._num_settled = 0
        self._lock = threading.Lock()
        gc.freeze()

    def settle(self) -> None:
        """Much was made that will live: let it be looked at no more. To be called where nobody waits."""
        with self._lock:
            self._settle()

    def settle_if_due(self, num_loads: int) -> None:
        """Settle when adapters were loaded `LOADS_TOGETHER` times since this last did. `num_loads`: of all time."""
        with self._lock:
            if num_loads - self._num_settled >= LOADS_TOGETHER:
                self._num_settled = num_loads
                self._settle()

    def _settle(self) -> None:
        if self._clock() - self._thawed_s >= THAW_S:
            gc.unfreeze()
            gc.collect()
            self._thawed_s = self._clock()
        else:
            gc.collect(1)
        gc.freeze()
