"""Concurrent publishers lose nothing, and every alias has one line of history."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import UnknownModelError
from storage.index import reconcile
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.passing_store import InterruptingStore
from tests.storage.versions import NAME, publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")

_REPOSITORY = Path(__file__).parents[2]


def test_of_many_publishers_every_version_stays_and_every_move_counts(
    registry: Registry,
) -> None:
    start = threading.Barrier(8)

    def run(publisher: int) -> None:
        start.wait()
        for number in range(3):
            publish(registry, f"{publisher}/{number}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(8)))
    expected = {
        version_of(f"{publisher}/{number}") for publisher in range(8) for number in range(3)
    }
    assert {manifest.version for manifest in registry.versions(NAME)} == expected
    latest = registry.aliases(NAME)["latest"]
    assert latest.generation == len(expected), (
        "one generation per move: none was lost or taken twice"
    )
    assert registry.resolve(NAME) == latest.version
    assert latest.version in {version_of(f"{publisher}/2") for publisher in range(8)}


def test_publishers_in_processes_lose_nothing(settings: StorageSettings) -> None:
    """`python -m tests.storage.many_publishers` in small: every version, one line of history, a true index."""
    command = [sys.executable, "-m", "tests.storage.many_publishers", "--settings"]
    sizes = ["--processes", "4", "--versions", "5", "--names", "2"]
    told = subprocess.run(
        [*command, settings.model_dump_json(), *sizes],
        cwd=_REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(told.stdout)["versions"] == 20


def test_whoever_publishes_the_same_content_at_once_gets_the_same_version(
    registry: Registry,
) -> None:
    start = threading.Barrier(6)

    def run(_: int) -> str:
        start.wait()
        return publish(registry, "same")

    with ThreadPoolExecutor(6) as threads:
        versions = set(threads.map(run, range(6)))
    assert versions == {version_of("same")}
    assert len(registry.versions(NAME)) == 1
    assert registry.aliases(NAME)["latest"].generation == 1


_Action = Callable[[Registry], object]


def _interleaved(folder: Path, outer: _Action, inner: _Action) -> Iterator[Registry]:
    """A registry with version `old`, for each point inside `outer` where `inner` may happen, after both did."""
    for at in itertools.count():
        store = open_store(StorageSettings(registry=str(folder / str(at))))
        registry = Registry(store)
        publish(registry, "old")
        interrupting = InterruptingStore(store, at, lambda there=registry: inner(there))
        outer(Registry(interrupting))
        assert reconcile(store, anew=True) == [], "the index is not what the records say"
        if not interrupting.has_happened:
            assert at > 5, "nothing was interrupted: this test proved nothing"
            return
        yield registry


def _deletes(registry: Registry) -> None:
    registry.delete(NAME)


def _publishes(text: str) -> _Action:
    return lambda registry: publish(registry, text)


@pytest.mark.parametrize("text", ["new", "old"])
@pytest.mark.parametrize("is_delete_first", [True, False])
def test_a_delete_takes_a_publish_away_whole_or_not_at_all(
    tmp_path: Path, text: str, is_delete_first: bool
) -> None:
    actions = (_deletes, _publishes(text)) if is_delete_first else (_publishes(text), _deletes)
    outcomes = set()
    for registry in _interleaved(tmp_path, *actions):
        found = [manifest.version for manifest in registry.versions(NAME)]
        outcomes.add(tuple(found))
        if found:
            assert found == [version_of(text)] == [registry.resolve(NAME)]
            assert list(registry.list()) == [NAME]
        else:
            with pytest.raises(UnknownModelError):
                registry.resolve(NAME)
            assert registry.aliases(NAME) == {} and list(registry.list()) == []
        before = registry.generation()
        publish(registry, text)
        assert registry.resolve(NAME) == version_of(text)
        assert registry.generation() > before
    assert outcomes == {(), (version_of(text),)}, "only one order was met"


def test_two_publishes_in_any_interleaving_both_count(tmp_path: Path) -> None:
    for registry in _interleaved(tmp_path, _publishes("one"), _publishes("two")):
        versions = {manifest.version for manifest in registry.versions(NAME)}
        assert versions == {version_of(text) for text in ("old", "one", "two")}
        latest = registry.aliases(NAME)["latest"]
        assert latest.generation == 3
        assert latest.version in (version_of("one"), version_of("two"))


def test_two_deletes_in_any_interleaving_leave_nothing(tmp_path: Path) -> None:
    def deletes_if_there(registry: Registry) -> None:
        with suppress(UnknownModelError):
            registry.delete(NAME)

    for registry in _interleaved(tmp_path, deletes_if_there, deletes_if_there):
        assert registry.versions(NAME) == [] and list(registry.list()) == []


def test_no_change_is_announced_before_it_can_be_seen(tmp_path: Path) -> None:
    """A poller that reads everything at every point of a publish misses nothing once the generation rests."""
    polled: dict[Registry, tuple[int, object]] = {}

    def poll(registry: Registry) -> None:
        polled[registry] = registry.generation(), registry.aliases(NAME)

    for registry in _interleaved(tmp_path, _publishes("new"), poll):
        seen, aliases = polled[registry]
        assert seen < registry.generation() or aliases == registry.aliases(NAME)
