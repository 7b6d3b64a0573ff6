"""The promises of `ObjectStore`, each kept by every implementation."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.object_store import (
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    PreconditionFailedError,
    checked_key,
)
from storage.stores import open_store

_REPOSITORY = Path(__file__).parents[2]


def test_both_stores_are_object_stores(store: ObjectStore) -> None:
    assert isinstance(store, ObjectStore)


def test_what_was_put_is_read_back(store: ObjectStore) -> None:
    for data in (b"", b"one", bytes(range(256)) * 5000):
        store.put("folder/thing", data)
        assert store.get("folder/thing").data == data
        assert store.exists("folder/thing")


def test_a_missing_object_is_not_found(store: ObjectStore) -> None:
    store.put("folder/thing", b"x")
    for key in ("other", "folder", "folder/thing/below"):
        with pytest.raises(ObjectNotFoundError):
            store.get(key)
        with pytest.raises(ObjectNotFoundError):
            store.get_range(key, 0, 1)
        with pytest.raises(ObjectNotFoundError):
            store.get_range(key, 0, 0)
        assert not store.exists(key)


def test_a_range_is_cut_where_the_object_ends(store: ObjectStore) -> None:
    store.put("letters", b"abcdefgh")
    for start, stop, expected in (
        (0, 4, b"abcd"),
        (2, 5, b"cde"),
        (4, 100, b"efgh"),
        (8, 9, b""),
        (50, 60, b""),
        (3, 3, b""),
        (5, 2, b""),
    ):
        assert store.get_range("letters", start, stop) == expected


def test_put_if_absent_never_replaces(store: ObjectStore) -> None:
    store.put_if_absent("a/b", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(PreconditionFailedError):
            store.put_if_absent("a/b", data)
    assert store.get("a/b").data == b"first"


def test_put_if_absent_works_again_after_a_delete(store: ObjectStore) -> None:
    store.put_if_absent("a", b"first")
    store.delete("a")
    store.put_if_absent("a", b"second")
    assert store.get("a").data == b"second"


def test_compare_and_swap_replaces_exactly_the_state_it_names(store: ObjectStore) -> None:
    first = store.put_if_absent("a", b"1")
    assert store.get("a").etag == first
    second = store.compare_and_swap("a", b"2", first)
    assert store.get("a").etag == second != first
    for stale in (first, '"0123456789abcdef0123456789abcdef"'):
        with pytest.raises(PreconditionFailedError):
            store.compare_and_swap("a", b"3", stale)
    assert store.get("a").data == b"2"


def test_compare_and_swap_fails_on_an_object_that_is_gone(store: ObjectStore) -> None:
    etag = store.put_if_absent("a", b"1")
    store.delete("a")
    with pytest.raises(PreconditionFailedError):
        store.compare_and_swap("a", b"2", etag)
    assert not store.exists("a")


def test_deleting_twice_is_no_error(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert not store.exists("a/b")


def test_a_listing_is_in_key_order_and_only_below_its_prefix(store: ObjectStore) -> None:
    keys = ["a", "b-1", "b.json", "b/1", "b/2/x", "b/2-", "b0", "bb/1", "c/d/e/f", "Z"]
    for key in keys:
        store.put(key, key.encode())
    for prefix in ("", "b", "b/", "b/2", "c/d/e", "c/d/e/f", "no", "b/2/x/y"):
        listed = list(store.list(prefix))
        assert [entry.key for entry in listed] == sorted(
            key for key in keys if key.startswith(prefix)
        )
        assert all(entry.num_bytes == len(entry.key) for entry in listed)


def test_a_listing_tells_when_an_object_was_written_last(store: ObjectStore) -> None:
    store.put("a", b"x")
    (before,) = store.list("a")
    time.sleep(1.1)  # S3 keeps whole seconds
    store.put("a", b"x")
    (after,) = store.list("a")
    assert isinstance(after, ObjectInfo)
    assert abs(time.time() - after.modified_s) < 60
    assert after.modified_s > before.modified_s


def test_a_listing_is_complete_beyond_one_page(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for number in range(35):
        store.put(f"many/{number:02}", b"")
    assert [entry.key for entry in store.list("many/")] == [f"many/{n:02}" for n in range(35)]


def test_a_key_that_could_leave_the_store_is_refused(store: ObjectStore) -> None:
    for key in ("", "/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", "a b", "a\\b", "~lock", "é"):
        with pytest.raises(ValueError):
            checked_key(key)
        for call in (store.get, store.exists, store.delete):
            with pytest.raises(ValueError):
                call(key)
        with pytest.raises(ValueError):
            store.put(key, b"")
        with pytest.raises(ValueError):
            store.put_if_absent(key, b"")


def test_of_many_threads_creating_one_object_exactly_one_wins(store: ObjectStore) -> None:
    def create(number: int) -> bool:
        try:
            store.put_if_absent(key, b"%d" % number)
        except PreconditionFailedError:
            return False
        return True

    with ThreadPoolExecutor(12) as threads:
        for key in ("race/1", "race/2", "race/3"):
            won = list(threads.map(create, range(12)))
            assert won.count(True) == 1
            assert store.get(key).data == b"%d" % won.index(True)


def test_no_increment_by_many_threads_is_lost(store: ObjectStore) -> None:
    store.put_if_absent("counter", b"0")

    def increment(_: int) -> int:
        lost = 0
        while True:
            seen = store.get("counter")
            try:
                store.compare_and_swap("counter", b"%d" % (int(seen.data) + 1), seen.etag)
            except PreconditionFailedError:
                lost += 1
                continue
            return lost

    with ThreadPoolExecutor(6) as threads:
        lost = sum(threads.map(increment, range(30)))
    assert store.get("counter").data == b"30"
    assert lost > 0, "the increments never met: this test proved nothing"


_RACE = """
import sys, time
from storage.config import StorageSettings
from storage.object_store import PreconditionFailedError
from storage.stores import open_store

store = open_store(StorageSettings.model_validate_json(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
won = 0
for number in range(20):
    try:
        store.put_if_absent(f"race/{number}", sys.argv[2].encode())
        won += 1
    except PreconditionFailedError:
        pass
    while True:
        seen = store.get("counter")
        try:
            store.compare_and_swap("counter", b"%d" % (int(seen.data) + 1), seen.etag)
        except PreconditionFailedError:
            continue
        break
print(won)
"""


def test_processes_race_as_fairly_as_threads(settings: StorageSettings) -> None:
    store = open_store(settings)
    store.put_if_absent("counter", b"0")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, settings.model_dump_json(), str(number)],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    answers = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        output, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        answers.append(int(output))
    assert sum(answers) == 20
    assert store.get("counter").data == b"60"
