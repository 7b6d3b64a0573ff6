"""Python's cycle collector in a process with many adapters: it stops every thread while it looks at all that lives.

In the manager, with ten thousand of them, and in a replica, with a model and a few hundred, that is hundreds of
thousands of objects: a tenth of a second or more, in which no answer goes on. Nearly all of them live for hours and end
by their reference counts, so they are set aside as soon as they are made, and only what is new is looked at. Cycles
among what was set aside are looked for now and then.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable

THAW_S = 3600.0
SWITCH_S = 0.001
"""Who computes lets others have the interpreter this often."""


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
        sys.setswitchinterval(SWITCH_S)
        gc.freeze()

    def settle(self) -> None:
        """Much was made that will live: let it be looked at no more. To be called where nobody waits."""
        with self._lock:
            if self._clock() - self._thawed_s >= THAW_S:
                gc.unfreeze()
                gc.collect()
                self._thawed_s = self._clock()
            else:
                gc.collect(1)
            gc.freeze()

    def settle_if_due(self, num_made: int, every: int) -> None:
        """Settle when `num_made`, a number that grows, is `every` more than when this last did."""
        if num_made - self._num_settled >= every:
            self._num_settled = num_made
            self.settle()
