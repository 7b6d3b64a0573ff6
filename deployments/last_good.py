"""The last good reading of something far away: whoever has one never waits for the next."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from storage.errors import FloraError

Reading = TypeVar("Reading")

LOOK_AGAIN_S = 1.0
"""However often something is asked for that is not there, it is looked for anew no more often than this."""

_log = logging.getLogger(__name__)


class LastGood(Generic[Reading]):
    """Reads again every `period_s`, on a thread of its own once `follow` was called. Safe from any thread.

    Args:
        read: blocks, and raises our errors; called by one thread at a time.
        name: of the thread, and in the log.
        clock: seconds; only differences matter.
    """

    def __init__(
        self,
        read: Callable[[], Reading],
        period_s: float,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._period_s = period_s
        self._name = name
        self._clock = clock
        self._tried_s = -math.inf
        self._last: Reading | None = None
        self._begun = 0
        self._ended = 0  # the number of the last reading that ended
        self._failure: Exception | None = None  # how it ended, if not well
        self._turn = threading.Lock()
        # Who waits for a reading must not hold a thread that others need.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._stopped = threading.Event()

    @property
    def last(self) -> Reading | None:
        """None before the first reading succeeded."""
        return self._last

    async def now(self) -> Reading:
        """What was read last. Waits only for the first reading, and raises what that one raises."""
        last = self._last
        return last if last is not None else await self.fresh()

    async def fresh(self) -> Reading:
        """What a reading that begins now finds. Raises what it raises; the last good one stands."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read_after, self._begun)

    async def recent(self, age_s: float) -> Reading:
        """What was read, or tried in vain, at most `age_s` ago; else what a reading now finds, as `fresh`."""
        last = self._last
        if last is not None and self._clock() - self._tried_s <= age_s:
            return last
        return await self.fresh()

    def refresh(self) -> Reading:
        """`fresh` for threads. Callers that wait for their turn together share one reading, also one that fails."""
        return self._read_after(self._begun)

    def _read_after(self, begun: int) -> Reading:
        """What a reading finds that begins after that one."""
        with self._turn:
            if self._ended > begun:
                if self._failure is not None:
                    raise self._failure
                if self._last is not None:
                    return self._last
            self._begun += 1
            self._failure = None
            self._tried_s = self._clock()
            try:
                self._last = last = self._read()
            except Exception as error:
                self._failure = error
                self._tried_s = self._clock()  # it may have waited long, and would again
                raise
            finally:
                self._ended = self._begun
            return last

    def follow(self) -> None:
        """Read for the rest of the process, or until `stop`."""
        threading.Thread(target=self._follow, name=self._name, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _follow(self) -> None:
        has_failed = False
        while not self._stopped.wait(self._period_s if self._begun else 0):
            try:
                self.refresh()
                has_failed = False
            except FloraError as error:
                if not has_failed:
                    _log.warning("%s stays as last read: %s", self._name, error.message)
                has_failed = True
            except Exception:
                # This thread must outlive anything a store may raise.
                _log.exception("%s stays as last read", self._name)
