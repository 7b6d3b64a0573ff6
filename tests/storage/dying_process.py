"""Does one thing to several registries and is killed in each, one store write later than in the one before.

Run as a process: `python -m tests.storage.dying_process publish:TEXT|collect SETTINGS_JSON…` prints one exit status per
registry.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from storage.collection import Collector
from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store
from storage.sweep import LEASE_S
from tests.storage.passing_store import PassingStore
from tests.storage.versions import publish


class DyingStore(PassingStore):
    """After so many writes it kills the process, as `kill -9` would."""

    def __init__(self, store: ObjectStore, writes_left: int) -> None:
        super().__init__(store)
        self._writes_left = writes_left
        self._lock = threading.Lock()

    def before(self, *, is_write: bool) -> None:
        with self._lock:
            if is_write and self._writes_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._writes_left -= is_write


def collect(store: ObjectStore, later_s: float = 0.0) -> None:
    """With no grace period, some time from now."""

    def clock() -> float:
        return time.time() + 1.0 + later_s

    Collector(Registry(store, clock), store, grace_s=0.0, clock=clock).collect()


def collect_after_the_lease(store: ObjectStore) -> None:
    collect(store, LEASE_S)


def main(what: str, registries: list[str]) -> None:
    os.fsync = lambda _: None  # a kill needs none, unlike a power cut
    for writes, settings in enumerate(registries):
        child = os.fork()
        if child == 0:
            store = DyingStore(open_store(StorageSettings.model_validate_json(settings)), writes)
            if what == "collect":
                collect(store)
            else:
                publish(Registry(store), what.removeprefix("publish:"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
