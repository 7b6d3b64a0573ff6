"""Publishes into several registries and is killed in each, one store write later than in the one before.

Run as a process: `python -m tests.storage.dying_publisher TEXT SETTINGS_JSON…` prints one exit status per registry.
"""

from __future__ import annotations

import os
import signal
import sys

from storage.config import StorageSettings
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.passing_store import PassingStore
from tests.storage.versions import publish


class DyingStore(PassingStore):
    """After so many writes it kills the process, as `kill -9` would."""

    def __init__(self, store: ObjectStore, writes_left: int) -> None:
        super().__init__(store)
        self._writes_left = writes_left

    def before(self, *, is_write: bool) -> None:
        if is_write and self._writes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._writes_left -= is_write


def main(text: str, registries: list[str]) -> None:
    for writes, settings in enumerate(registries):
        child = os.fork()
        if child == 0:
            store = open_store(StorageSettings.model_validate_json(settings))
            publish(Registry(DyingStore(store, writes)), text)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
