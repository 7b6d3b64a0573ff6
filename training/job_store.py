"""What lasts of a training job, in the registry's store: its events and files, also when the job and its Ray are gone.

    jobs/<job>/spec/…                          its specification and data      (training/stored_spec.py)
    jobs/<job>/events/<writer>-<nnnn>.jsonl    lines of one process that told something
    jobs/<job>/files/<name>                    such as loss.png, the learning curves
    jobs/<job>/stop/<adapter>                  it shall not go on; somebody cancelled it
    jobs/<job>/alive                            written again and again while its driver lives
    jobs/<job>/checkpoints/…                   what a resume goes on from      (training/checkpoints.py)

An object store cannot append. A writer puts its current object again, longer; when that is long enough it begins the
next one. No two processes write one object, so nothing is ever overwritten by anybody else, and readers need one
listing to see that nothing is new, however long the job has run.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import merge
from types import TracebackType
from typing import Self

from storage.errors import AdapterCorruptError, InvalidRequestError, StoreUnavailableError
from storage.identity import checked_name
from storage.object_store import ObjectNotFoundError, ObjectStore
from training.events import TrainingEvent, event_line, parse_event
from training.patience import patiently

LOSS_PICTURE = "loss.png"
DRIVER = "driver"
"""The name of the writer that tells of the job as a whole."""

ALIVE = "alive"

FLUSH_EVERY_S = 1.0
ALIVE_EVERY_S = 60.0
_OBJECT_BYTES = 256 << 10
_FIRST_BYTES = 4 << 10
_TICK_S = 1e-6  # clocks may stand still or be set back
_NAME = re.compile(r"(?P<writer>.+)-(?P<number>\d{4,})\.jsonl")

logger = logging.getLogger("flora.training")


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events that are new, and the cursor to read on from. Every stored event is in exactly one page.

    What one process told is in its order; between processes the order is that of their clocks, within a page.
    """

    events: tuple[TrainingEvent, ...]
    next: str


@dataclass(frozen=True, slots=True)
class EventObject:
    """Some of a writer's lines, as they were listed: more may follow in the last object of a writer."""

    key: str
    num_bytes: int


class JobStore:
    """One job's part of the registry's store. Makes no request before it is used. Safe from any thread.

    Methods raise StoreUnavailableError.

    Raises:
        InvalidRequestError: the id is not a valid name.
    """

    def __init__(self, store: ObjectStore, job_id: str) -> None:
        self.folder = f"jobs/{checked_name(job_id, param='job_id')}/"
        self._events = f"{self.folder}events/"
        self._stops = f"{self.folder}stop/"
        self._alive = f"{self.folder}{ALIVE}"
        self._store = store

    def writer(self, name: str, clock: Callable[[], float] = time.time) -> EventWriter:
        """A place for one process to tell its events; another one each time, also for the same name."""
        unique = f"{checked_name(name, param='writer')}-{secrets.token_hex(4)}"
        return EventWriter(self._store, self._events + unique, clock)

    def read_events(self, cursor: str = "", writer: str = "") -> EventPage:
        """What was told since `cursor`, the `next` of an earlier page; from the beginning without one.

        With the name of a `writer`, only what was told under that name: the driver tells little, the workers every
        step. A job that told nothing yet, or does not exist, has an empty page.

        Raises:
            InvalidRequestError: not a cursor.
            AdapterCorruptError: a stored line is not an event.
        """
        position = _parsed_cursor(cursor)
        new: dict[str, list[TrainingEvent]] = {}
        for source, objects in self.event_objects(writer).items():
            at, offset = position.get(source, (0, 0))
            for number in sorted(number for number in objects if number >= at):
                offset = offset if number == at else 0
                one = objects[number]
                # One that has a successor has ended, perhaps after its size was listed.
                if number == max(objects) and one.num_bytes <= offset:
                    continue
                data = self.event_lines(one, offset)
                new.setdefault(source, []).extend(self.parsed(one, data.splitlines()))
                position[source] = (number, offset + len(data))
        events = merge(*new.values(), key=lambda event: event.at_s)
        return EventPage(tuple(events), json.dumps(position, separators=(",", ":")))

    def event_objects(self, writer: str = "") -> dict[str, dict[int, EventObject]]:
        """Each writer, or each of that name → its objects, by their numbers."""
        found: dict[str, dict[int, EventObject]] = {}
        for info in self._store.list(self._events + (f"{writer}-" if writer else "")):
            name = _NAME.fullmatch(info.key.removeprefix(self._events))
            if name is not None:
                one = EventObject(info.key, info.num_bytes)
                found.setdefault(name["writer"], {})[int(name["number"])] = one
        return found

    def event_lines(self, one: EventObject, offset: int = 0, stop: int | None = None) -> bytes:
        """Up to `stop`, or to its end: it may have grown since it was listed, except one of a single long line."""
        try:
            stop = max(one.num_bytes, _OBJECT_BYTES) if stop is None else stop
            return self._store.get_range(one.key, offset, stop)
        except ObjectNotFoundError:  # removed since
            return b""

    def first_event(self, one: EventObject) -> TrainingEvent:
        """Raises as `parsed`."""
        line, newline, _ = self.event_lines(one, stop=_FIRST_BYTES).partition(b"\n")
        if not newline:
            line, _, _ = self.event_lines(one).partition(b"\n")
        return self.parsed(one, (line,))[0]

    def parsed(self, one: EventObject, lines: Iterable[bytes]) -> list[TrainingEvent]:
        """Some of its lines as events. Raises AdapterCorruptError."""
        try:
            return [parse_event(line) for line in lines]
        except ValueError as error:
            name = one.key.removeprefix(self._events)
            raise AdapterCorruptError(f"the events of {name} cannot be read: {error}") from error

    def put_file(self, name: str, data: bytes) -> None:
        """Keep a file of the job, in place of an earlier one of that name."""
        self._store.put(self._file(name), data)

    def get_file(self, name: str) -> bytes:
        """Raises ObjectNotFoundError."""
        return self._store.get(self._file(name)).data

    def sign_of_life(self) -> None:
        """The driver is there. To be told every `ALIVE_EVERY_S`."""
        self._store.put(self._alive, b"{}")

    def alive_s(self) -> float | None:
        """When the driver last said that it is there, by the store's clock; None when it never did."""
        found = (one for one in self._store.list(self._alive) if one.key == self._alive)
        return max((one.modified_s for one in found), default=None)

    def stop(self, adapter: str) -> None:
        """Ask the workers to stop one adapter at their next checkpoint; the others go on. May be repeated."""
        self._store.put(self._stops + adapter, b"{}")

    def stopped(self) -> frozenset[str]:
        """The adapters that are to stop, or have."""
        return frozenset(one.key.removeprefix(self._stops) for one in self._store.list(self._stops))

    def _file(self, name: str) -> str:
        return f"{self.folder}files/{name}"


class EventWriter:
    """An `EventSink`: what it is told is stored within `FLUSH_EVERY_S` by a thread of its own, or at once by `flush`.

    While the store cannot be reached events wait here. A killed process loses what was not stored yet: whoever
    makes something else durable that rests on an event (a checkpoint, say) calls `flush` first.
    """

    def __init__(self, store: ObjectStore, key: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._key = key
        self._clock = clock
        self._told_s = -math.inf
        self._number = 0
        self._stored = b""  # of the current object
        self._waiting: list[bytes] = []
        self._telling = threading.Lock()
        self._storing = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_flushing, name="job-events", daemon=True)
        self._thread.start()

    def __call__(self, event: TrainingEvent) -> None:
        """Take the event in, with the time, which is later than the last one's. Waits for no store."""
        with self._telling:
            self._told_s = max(self._clock(), self._told_s + _TICK_S)
            self._waiting.append(event_line(replace(event, at_s=self._told_s)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def flush(self) -> None:
        """Returns when everything told before is stored. Raises StoreUnavailableError, and keeps it."""
        with self._storing:
            while (taken := self._next_lines()) > 0:
                lines = b"".join(self._waiting[:taken])
                self._store.put(f"{self._key}-{self._number:04}.jsonl", self._stored + lines)
                self._stored += lines
                with self._telling:
                    del self._waiting[:taken]

    def close(self) -> None:
        """Flush for the last time. Raises StoreUnavailableError: not for a moment only."""
        self._closed.set()
        self._thread.join()
        patiently(self.flush)

    def _next_lines(self) -> int:
        """How many of those waiting go into the current object, which is a new one when the old one is full.

        A line that is too long for any object gets one to itself.
        """
        with self._telling:
            sizes = [len(line) for line in self._waiting]
        if self._stored and sizes and len(self._stored) + sizes[0] > _OBJECT_BYTES:
            self._number, self._stored = self._number + 1, b""
        total, taken = len(self._stored), 0
        while taken < len(sizes) and (total + sizes[taken] <= _OBJECT_BYTES or total == 0):
            total += sizes[taken]
            taken += 1
        return taken

    def _keep_flushing(self) -> None:
        is_away = False
        while not self._closed.wait(FLUSH_EVERY_S):
            try:
                self.flush()
            except StoreUnavailableError as error:
                if not is_away:
                    logger.warning("events wait for the registry's store: %s", error.message)
                is_away = True
            else:
                is_away = False


def _parsed_cursor(cursor: str) -> dict[str, tuple[int, int]]:
    if not cursor:
        return {}
    try:
        values = json.loads(cursor)
        if not isinstance(values, Mapping):
            raise ValueError
        return {str(key): (int(number), int(offset)) for key, (number, offset) in values.items()}
    except (ValueError, TypeError):
        raise InvalidRequestError("not a cursor into a job's events", param="after") from None
