"""The index as one process follows it: after the first time, only what changed is read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from storage import layout
from storage.errors import AdapterCorruptError
from storage.generation import bump_generation, read_generation
from storage.identity import AdapterName, AdapterVersion
from storage.index import claim_comparison, parallel, read_shard, reconcile
from storage.index_entry import AdapterEntry, Shard
from storage.manifest import Quarantine
from storage.object_store import ObjectStore
from storage.records import read

COMPARE_S = 60.0
"""What a publisher did not announce, because it was killed, is heard of after this long."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexState:
    """All adapters at one time, in order of tenant and name; deleted ones are left out.

    An entry that did not change is the same object as in the state before.
    """

    generation: int = -1
    adapters: Mapping[AdapterName, AdapterEntry] = field(default_factory=dict)
    quarantined: Mapping[AdapterVersion, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _ReadShard:
    entries: Mapping[AdapterName, AdapterEntry] = field(default_factory=dict)
    stamp: str = ""


_NO_SHARD = _ReadShard()


class IndexReader:
    """Safe to use from any thread; one reads at a time and the others wait for it.

    Whichever reader of a registry comes first after `COMPARE_S` compares the index with the records, for all of them.

    Args:
        clock: seconds since the epoch, as the registry's; decides when to compare.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._state = IndexState()
        self._shards: dict[str, _ReadShard] = {}
        self._quarantine_stamps: dict[str, str] = {}
        self._read_s: float | None = None

    def read(self) -> IndexState:
        """What is published now; the same object as the last time when nothing has changed.

        Raises:
            StoreUnavailableError: the registry cannot be reached.
        """
        with self._lock:
            # Before the shards: a change in between is then read again, never missed.
            generation = read_generation(self._store)
            now_s = self._clock()
            is_due = self._read_s is None or not 0 <= now_s - self._read_s < COMPARE_S
            if generation == self._state.generation and not is_due:
                return self._state
            if is_due:
                self._compare_if_nobody_has(now_s)
            fresh = self._follow(generation)
            if is_due:
                self._read_s = self._clock()
            if fresh != self._state:
                self._state = fresh
            return self._state

    def _compare_if_nobody_has(self, now_s: float) -> None:
        try:
            if claim_comparison(self._store, now_s, COMPARE_S):
                self._compare()
        except AdapterCorruptError as error:
            _log.error("the index is not compared: %s", error.message)

    def _compare(self) -> None:
        wrong = reconcile(self._store)
        if wrong:
            _log.warning("put right in the index: %d adapters, such as %s", len(wrong), wrong[0])
            bump_generation(self._store)

    def _follow(self, generation: int) -> IndexState:
        listed = self._listed()
        if layout.INDEX_IS_WHOLE not in listed:
            self._compare()
            listed = self._listed()
        changes = self._changes(listed)
        if any(self._is_loss(key, change) for key, change in changes.items()):
            # What a damaged or lost shard had is still in the records.
            self._compare()
            changes = self._changes(self._listed())
        for key, change in changes.items():
            if change is not None:
                self._shards[key] = change
        quarantined = self._read_quarantine()
        adapters = {
            name: entry
            for shard in self._shards.values()
            for name, entry in shard.entries.items()
            if entry.versions
        }
        ordered = sorted(adapters, key=lambda name: (name.tenant, name.name))
        return IndexState(generation, {name: adapters[name] for name in ordered}, quarantined)

    def _listed(self) -> dict[str, str]:
        return {each.key: each.stamp for each in self._store.list(layout.INDEX)}

    def _changes(self, listed: Mapping[str, str]) -> dict[str, _ReadShard | None]:
        """What shards are other than they were read, as they are now; None for one that cannot be read."""
        stamps = {key: stamp for key, stamp in listed.items() if layout.is_shard(key)}
        changed = [
            key
            for key, stamp in stamps.items()
            if key not in self._shards or stamp != self._shards[key].stamp
        ]
        shards = parallel(lambda key: read_shard(self._store, key), changed)
        changes: dict[str, _ReadShard | None] = {}
        for key, shard in zip(changed, shards, strict=True):
            before = self._shards.get(key, _NO_SHARD).entries
            changes[key] = (
                None if shard is None else _ReadShard(_entries(shard, before), stamps[key])
            )
        lost = {key for key, shard in self._shards.items() if shard.entries} - stamps.keys()
        return changes | dict.fromkeys(lost, _NO_SHARD)

    def _is_loss(self, key: str, change: _ReadShard | None) -> bool:
        """No writer takes an adapter out of the index: deleted ones stay, without versions."""
        before = self._shards.get(key, _NO_SHARD)
        return change is None or not before.entries.keys() <= change.entries.keys()

    def _read_quarantine(self) -> Mapping[AdapterVersion, str]:
        known, stamps = self._state.quarantined, self._quarantine_stamps
        found, found_stamps = {}, {}
        for each in self._store.list(layout.QUARANTINE):
            version = layout.parse_quarantine(each.key)
            if version is not None:
                is_known = version in known and stamps.get(each.key) == each.stamp
                found[version] = known[version] if is_known else _reason(self._store, each.key)
                found_stamps[each.key] = each.stamp
        self._quarantine_stamps = found_stamps
        return known if found == known else found


def _entries(
    shard: Shard, before: Mapping[AdapterName, AdapterEntry]
) -> dict[AdapterName, AdapterEntry]:
    entries = {}
    for text, entry in shard.adapters.items():
        name = AdapterName(*text.split("/"))
        old = before.get(name)
        is_same = old is not None and old.revision == entry.revision and old == entry
        entries[name] = old if old is not None and is_same else entry
    return entries


def _reason(store: ObjectStore, key: str) -> str:
    try:
        record = read(store, key, Quarantine)
    except AdapterCorruptError as error:
        return error.message
    return "" if record is None else record.reason
