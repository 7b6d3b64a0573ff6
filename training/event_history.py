"""What training jobs told of one adapter, newest first, read only as far back as somebody looks."""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from heapq import merge

from storage.object_store import ObjectStore
from training.events import TrainingEvent, told_us
from training.job_store import EventObject, JobStore

_REMEMBERED = 4096  # objects of events: a gigabyte of them
_ADAPTER = re.compile(rb'"adapter": "([^"]*)"')


class EventHistory:
    """Reads one object of events at a time, none that tells nothing of the adapter if it was read before. Any thread.

    Every method blocks, and raises StoreUnavailableError, and AdapterCorruptError for a line that is no event.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._adapters: OrderedDict[EventObject, frozenset[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def back(
        self, job_id: str, adapter: str, until_us: int | None = None
    ) -> Iterator[TrainingEvent]:
        """All that was told of an adapter, the newest first; none later than `until_us`, microseconds since the epoch.

        Objects are read when the iterator comes to them.
        """
        job = JobStore(self._store, job_id)
        writers = [
            self._back(job, objects, adapter, until_us) for objects in job.event_objects().values()
        ]
        return merge(*writers, key=told_us, reverse=True)

    def _back(
        self,
        job: JobStore,
        objects: Mapping[int, EventObject],
        adapter: str,
        until_us: int | None,
    ) -> Iterator[TrainingEvent]:
        """What one writer told."""
        ordered = [objects[number] for number in sorted(objects)]
        if until_us is not None and len(ordered) > 1:
            # A writer's times only rise.
            begun = bisect_right(ordered, until_us, key=lambda one: told_us(job.first_event(one)))
            ordered = ordered[:begun]
        for one in reversed(ordered):
            if self._is_known_without(one, adapter):
                continue
            data = job.event_lines(one)
            self._remember(one, data)
            events = job.parsed(one, (line for line in data.splitlines() if _tells(line, adapter)))
            for event in reversed(events):
                if until_us is None or told_us(event) <= until_us:
                    yield event

    def _is_known_without(self, one: EventObject, adapter: str) -> bool:
        with self._lock:
            if one not in self._adapters:
                return False
            self._adapters.move_to_end(one)
            return adapter.encode() not in self._adapters[one]

    def _remember(self, one: EventObject, data: bytes) -> None:
        if len(data) != one.num_bytes:
            return  # it has grown since it was listed
        with self._lock:
            self._adapters[one] = frozenset(_ADAPTER.findall(data))
            if len(self._adapters) > _REMEMBERED:
                self._adapters.popitem(last=False)


def _tells(line: bytes, adapter: str) -> bool:
    found = _ADAPTER.search(line)
    return found is not None and found[1] == adapter.encode()
