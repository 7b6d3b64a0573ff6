"""The stages of a load of an adapter, and how long each took. Knows nothing of adapters: whoever loads one measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Stage = Literal["queue", "registry", "digest", "parse", "disk_read", "disk_write", "device"]
"""queue: from when it was asked for until a thread takes it up; registry: reading from the object store; digest:
sha256 of what was read; parse: files to rows; device: rows into the bank."""


class StageClock:
    """Measures one load. A stage that is entered again goes on counting.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.stage_s: dict[Stage, float] = {}

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Count the time inside, also when it ends with an error."""
        began_s = self._clock()
        try:
            yield
        finally:
            self.stage_s[name] = self.stage_s.get(name, 0.0) + self._clock() - began_s
