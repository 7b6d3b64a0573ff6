"""The registry as a replica's loads read it: while it is known to be away, they are told so at once, and a small file
that many adapters have, settings above all, is fetched once.

A read that fails says that the registry is away, and from then on nobody tries until a probe in the background was
answered. Nothing runs by itself: whoever asks for a file, or whether the registry is there, has a probe started when
one is due.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from storage.errors import AdapterCorruptError, FloraError, StoreUnavailableError
from storage.identity import AdapterVersion
from storage.load_stages import StageClock
from storage.manifest import FileEntry, ManifestContent
from storage.registry import Registry

PROBE_AWAY_S = 1.0
"""How long after a probe or a read that failed the next probe begins."""

PROBE_QUIET_S = 5.0
"""How long nobody read anything until a probe shows whether the registry is still there."""

SMALL_FILE_BYTES = 64 << 10
"""Files up to this size are kept in memory, by digest."""

MAX_SMALL_FILES = 256
"""So many of them, those used last."""

_Answer = TypeVar("_Answer")


class RegistryReader:
    """Safe to use from any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._failure: StoreUnavailableError | None = None
        self._answered_s = self._tried_s = clock()
        self._is_probing = False
        self._small_files: OrderedDict[FileEntry, bytes] = OrderedDict()  # last used last

    def content(self, version: AdapterVersion, stages: StageClock) -> ManifestContent:
        """As `Registry.content`; raises StoreUnavailableError at once while the registry is away."""
        with stages.stage("registry"):
            return self._ask(lambda: self._registry.content(version))

    def read_file(self, entry: FileEntry, stages: StageClock) -> bytes:
        """As `Registry.read_file`; raises StoreUnavailableError at once while the registry is away, except for a small
        file it has read before.
        """
        if entry.num_bytes > SMALL_FILE_BYTES:
            return self._ask(lambda: self._registry.read_file(entry, stages))
        with self._lock:
            kept = self._small_files.get(entry)
            if kept is not None:
                self._small_files.move_to_end(entry)
                return kept
        data = self._ask(lambda: self._registry.read_file(entry, stages))
        with self._lock:
            self._small_files[entry] = data
            if len(self._small_files) > MAX_SMALL_FILES:
                self._small_files.popitem(last=False)
        return data

    def check_up(self) -> None:
        """Raises StoreUnavailableError while the registry is known to be away."""
        failure = self._failure
        if failure is not None:
            self._probe_if_due()
            raise StoreUnavailableError(
                "the adapter is not kept on this replica, and the registry is away at the moment; try again later "
                f"({failure.message})"
            )

    def is_up(self) -> bool:
        """Whether the registry answered when it was last asked. Returns at once."""
        self._probe_if_due()
        return self._failure is None

    def _ask(self, read: Callable[[], _Answer]) -> _Answer:
        self.check_up()
        try:
            return self._try(read)
        except AdapterCorruptError:
            # Perhaps it was damaged on its way: a version that is reported as damaged is taken from everybody.
            return self._try(read)

    def _try(self, read: Callable[[], _Answer]) -> _Answer:
        began_s = self._clock()
        try:
            answer = read()
        except StoreUnavailableError as error:
            with self._lock:
                self._tried_s = self._clock()
                # A read that hung since before an outage ended says nothing of now.
                if began_s >= self._answered_s:
                    self._failure = error
            raise
        except FloraError:
            self._answered()
            raise
        self._answered()
        return answer

    def _answered(self) -> None:
        with self._lock:
            self._failure = None
            self._answered_s = self._tried_s = self._clock()

    def _probe_if_due(self) -> None:
        with self._lock:
            wait_s = PROBE_QUIET_S if self._failure is None else PROBE_AWAY_S
            if self._is_probing or self._clock() - self._tried_s < wait_s:
                return
            self._is_probing = True
        threading.Thread(target=self._probe, name="registry-probe", daemon=True).start()

    def _probe(self) -> None:
        try:
            self._try(self._registry.generation)
        except StoreUnavailableError:
            pass  # noted, and the next probe will come
        finally:
            with self._lock:
                self._is_probing = False
