"""What keeps garbage collection and publishers apart: the record of what is being taken away right now.

A collector writes the record, then looks once more whether anything names what it is about to delete or wrote it
lately, and only then deletes. A publisher writes, then reads the record, then looks whether all it wrote is there: once
before it commits and once after. Either the collector's look comes after the writes and it keeps everything, or the
publisher finds the record, or finds something gone: then it waits for the sweep to end and writes again. Nobody waits
for a collector that was killed longer than its lease.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable

from pydantic import BaseModel, ConfigDict, Field

from storage import layout
from storage.errors import OverloadedError
from storage.index import parallel
from storage.object_store import ObjectStore
from storage.records import read, swap

LEASE_S = 120.0
"""A sweep ends within this long, or its collector is dead."""
_LAST_DELETE_BEFORE_END_S = 40.0
"""Longer than a request to a store may take, with its repetitions."""
_LOOK_AGAIN_S = 0.1


class Sweep(BaseModel):
    """`collection/sweep.json`: what a collector is taking away. No keys when it ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    collector: str
    keys: tuple[str, ...] = ()
    ends_s: float = Field(description="Seconds since the epoch. Nothing is deleted after that.")


def sweep(
    store: ObjectStore,
    keys: Collection[str],
    still_garbage: Callable[[Collection[str]], Iterable[str]],
    clock: Callable[[], float],
) -> list[str]:
    """Delete what is garbage, safe from publishers; returns the keys that are gone.

    Args:
        still_garbage: looks again, after publishers were warned, and returns those that may go.
        clock: seconds since the epoch.

    Raises:
        OverloadedError: another collector is at work.
    """
    collector = uuid.uuid4().hex
    ends_s = clock() + LEASE_S

    def begin(current: Sweep | None) -> Sweep:
        if current is not None and current.keys and clock() < current.ends_s:
            raise OverloadedError("another garbage collection is running; try again later")
        return Sweep(collector=collector, keys=tuple(sorted(keys)), ends_s=ends_s)

    def end(current: Sweep | None) -> Sweep | None:
        is_ours = current is not None and current.collector == collector
        return Sweep(collector=collector, ends_s=0.0) if is_ours else None

    def delete(key: str) -> bool:
        if clock() > ends_s - _LAST_DELETE_BEFORE_END_S:
            return False  # publishers may be waiting no longer
        store.delete(key)
        return True

    swap(store, layout.SWEEP, Sweep, begin)
    try:
        garbage = sorted(still_garbage(keys))
        gone = parallel(delete, garbage)
    finally:
        swap(store, layout.SWEEP, Sweep, end)
    return [key for key, is_gone in zip(garbage, gone, strict=True) if is_gone]


def was_swept(
    store: ObjectStore,
    keys: Collection[str],
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a collector may have deleted any of these objects, which were written and are named by now.

    False says that they are there and stay. After True they must be written again; no sweep names them any more.
    """
    has_waited = False
    while True:
        current = read(store, layout.SWEEP, Sweep)
        if current is None or clock() > current.ends_s or not set(keys).intersection(current.keys):
            break
        has_waited = True
        sleep(_LOOK_AGAIN_S)
    return has_waited or not all(store.exists(key) for key in keys)
