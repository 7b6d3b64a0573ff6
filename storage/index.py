"""The index: what lists and placement need of every adapter, in a few objects instead of one per version.

It is a cache of the adapters' records and never the truth. Two rules keep it right, whoever writes at the same time:
an entry is made from records that were read after the shard it replaces, so the last of several writers has seen what
all of them did; and what no writer announced, such as a publish that was killed, is found by comparing one listing of
the records with the entries. An index that is lost, damaged or of another format is made anew by the same comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from storage import layout
from storage.errors import AdapterCorruptError, OverloadedError
from storage.identity import AdapterName
from storage.index_entry import AdapterEntry, Shard, by_adapter, make_entry
from storage.object_store import (
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    PreconditionFailedError,
)
from storage.records import ATTEMPTS, decode, encode, swap, wait_after_lost_race

READ_AT_ONCE = 32
"""Requests in flight when many objects are read."""

_log = logging.getLogger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class WholeMark(BaseModel):
    """`index/whole.json`: every adapter is in the index, or its publisher has not come to that yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1


class Comparison(BaseModel):
    """`index/compared.json`: the last time somebody compared the index with the records."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: float = Field(description="Seconds since the epoch.")


@dataclass(frozen=True, slots=True)
class _Found:
    """A shard as it is stored: `shard` is None when it cannot be read, `etag` when there is none."""

    shard: Shard | None
    etag: str | None

    def entry(self, name: AdapterName) -> AdapterEntry | None:
        return None if self.shard is None else self.shard.adapters.get(str(name))


def update_entry(store: ObjectStore, name: AdapterName) -> None:
    """Let the index say what the registry holds of an adapter now, whatever others do at the same time.

    Raises:
        AdapterCorruptError: a record of the adapter or its shard is damaged; the index keeps what it has.
        OverloadedError: others wrote the shard faster than this call could.
    """
    key = layout.shard(name)
    first_revision: int | None = None
    for attempt in range(ATTEMPTS):
        found = _read(store, key)
        if found.shard is None:
            raise AdapterCorruptError(f"the registry's index {key} is damaged")
        old = found.entry(name)
        revision = 0 if old is None else old.revision
        if first_revision is None:
            first_revision = revision
        elif revision >= first_revision + 2:
            # The second of these writers read the shard, and then the records, after this call began.
            return
        entry = make_entry(store, name, store.list(layout.adapter_folder(name)), old)
        if entry == old or _write(store, key, found, {name: entry}):
            return
        wait_after_lost_race(attempt)
    raise OverloadedError("too many changes of the registry's index at once")


def reconcile(store: ObjectStore, *, anew: bool = False) -> list[AdapterName]:
    """Compare one listing of all records with the index and put right what differs; returns whose entry was wrong.

    Makes the whole index when there is none. Adapters with damaged records keep the entry they have.

    Args:
        anew: make every entry from its records, also where the listing shows no difference.
    """
    # Before the listing: an entry that is still the same when it is written was not made from newer records.
    keys = [each.key for each in store.list(layout.SHARDS) if layout.is_shard(each.key)]
    found = dict(zip(keys, parallel(lambda key: _read(store, key), keys), strict=True))
    objects = by_adapter(store.list(layout.ADAPTERS))
    wrong: dict[str, dict[AdapterName, Sequence[ObjectInfo]]] = {
        key: {} for key, each in found.items() if each.shard is None
    }
    for name in objects.keys() | _names(found.values()):
        key = layout.shard(name)
        entry = found[key].entry(name) if key in found else None
        listed = objects.get(name, [])
        if anew or entry is None or not entry.is_made_from(name, listed):
            wrong.setdefault(key, {})[name] = listed

    def put_right(key: str) -> list[AdapterName]:
        return _put_right(store, key, found.get(key, _NO_SHARD), wrong[key], anew)

    changed = parallel(put_right, sorted(wrong))
    swap(store, layout.INDEX_IS_WHOLE, WholeMark, lambda old: None if old else WholeMark())
    return sorted(name for names in changed for name in names)


def claim_comparison(store: ObjectStore, now_s: float, period_s: float) -> bool:
    """Whether this caller is to compare: nobody has for a period, and of several at once one is chosen."""
    claimed = False

    def claim(last: Comparison | None) -> Comparison | None:
        nonlocal claimed
        # A time in the future is another machine's clock.
        claimed = last is None or not 0 <= now_s - last.at_s < period_s
        return Comparison(at_s=now_s) if claimed else None

    swap(store, layout.COMPARED, Comparison, claim)
    return claimed


def parallel(
    function: Callable[[_In], _Out], items: Iterable[_In], at_once: int = READ_AT_ONCE
) -> list[_Out]:
    """The function of every item, in order, so many at a time; the first error passes through."""
    waiting = list(items)
    if len(waiting) < 2:
        return [function(item) for item in waiting]
    with ThreadPoolExecutor(min(at_once, len(waiting))) as threads:
        return list(threads.map(function, waiting))


def read_shard(store: ObjectStore, key: str) -> Shard | None:
    """None when it is damaged, of another format, or gone meanwhile."""
    found = _read(store, key)
    return None if found.etag is None else found.shard


_NO_SHARD = _Found(Shard(), None)


def _read(store: ObjectStore, key: str) -> _Found:
    try:
        stored = store.get(key)
    except ObjectNotFoundError:
        return _NO_SHARD
    try:
        return _Found(decode(stored.data, Shard, key), stored.etag)
    except AdapterCorruptError:
        return _Found(None, stored.etag)


def _write(
    store: ObjectStore,
    key: str,
    found: _Found,
    entries: Mapping[AdapterName, AdapterEntry | None],
) -> bool:
    """Whether the shard, still as it was found, has these entries now; None takes one away."""
    before = {} if found.shard is None else found.shard.adapters
    changed = {str(name): entry for name, entry in entries.items()}
    after = {name: entry for name, entry in {**before, **changed}.items() if entry is not None}
    data = encode(Shard(adapters=after))
    try:
        if found.etag is None:
            store.put_if_absent(key, data)
        else:
            store.compare_and_swap(key, data, found.etag)
    except PreconditionFailedError:
        return False
    return True


def _names(shards: Iterable[_Found]) -> set[AdapterName]:
    return {
        AdapterName(*text.split("/"))
        for found in shards
        if found.shard is not None
        for text in found.shard.adapters
    }


def _put_right(
    store: ObjectStore,
    key: str,
    before: _Found,
    wrong: Mapping[AdapterName, Sequence[ObjectInfo]],
    anew: bool,
) -> list[AdapterName]:
    """Returns whose entries were changed."""
    for attempt in range(ATTEMPTS):
        found = _read(store, key)
        entries: dict[AdapterName, AdapterEntry | None] = {}
        for name, objects in wrong.items():
            old = found.entry(name)
            if old != before.entry(name):
                continue  # whoever wrote it since knew more
            try:
                fresh = make_entry(store, name, objects, old, rereads=anew) if objects else None
            except AdapterCorruptError as error:
                _log.error("adapter %s keeps its entry in the index: %s", name, error.message)
                continue
            if fresh != old:
                entries[name] = fresh
        is_right = not entries and found.shard is not None
        if is_right or _write(store, key, found, entries):
            return list(entries)
        wait_after_lost_race(attempt)
    raise OverloadedError("too many changes of the registry's index at once")
