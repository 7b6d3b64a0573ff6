"""The disk keeps what was used last, within its budget, whoever else uses it and whatever the disk does."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from storage.disk_cache import DiskCache
from storage.identity import AdapterVersion
from storage.manifest import ManifestContent
from tests.storage.versions import content_of, files_of

_TEXTS = [f"adapter {number}".ljust(2000) for number in range(5)]


def _adapter(number: int) -> tuple[ManifestContent, dict[str, bytes]]:
    files = files_of(_TEXTS[number])
    return content_of(files), files


def _version(number: int) -> AdapterVersion:
    return _adapter(number)[0].version


def _size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.fixture
def one_size(tmp_path: Path) -> int:
    """The bytes of one adapter in the cache; all are equal."""
    root = tmp_path / "measure"
    DiskCache(root, 1 << 20).write(*_adapter(0))
    return _size(root)


def test_what_was_written_is_read_back_by_any_cache_on_the_directory(tmp_path: Path) -> None:
    DiskCache(tmp_path, 1 << 20).write(*_adapter(0))
    other = DiskCache(tmp_path, 1 << 20)
    assert other.versions() == {_version(0)}
    assert other.read(_version(0)) == _adapter(0)
    assert other.read(_version(1)) is None


def test_the_longest_unused_goes_first(tmp_path: Path, one_size: int) -> None:
    root = tmp_path / "cache"
    cache = DiskCache(root, 3 * one_size)
    for number in range(3):
        cache.write(*_adapter(number))
        time.sleep(0.01)  # times of use must differ on this file system
    assert cache.read(_version(0)) is not None
    time.sleep(0.01)
    cache.write(*_adapter(3))
    assert cache.versions() == {_version(number) for number in (0, 2, 3)}
    # The order of use survives a restart.
    restarted = DiskCache(root, 3 * one_size)
    time.sleep(0.01)
    restarted.write(*_adapter(4))
    assert restarted.versions() == {_version(number) for number in (0, 3, 4)}
    assert _size(root) <= 3 * one_size


def test_a_smaller_budget_is_kept_from_the_next_write_on(tmp_path: Path, one_size: int) -> None:
    root = tmp_path / "cache"
    for number in range(4):
        DiskCache(root, 4 * one_size).write(*_adapter(number))
    DiskCache(root, 2 * one_size).write(*_adapter(4))
    assert _size(root) <= 2 * one_size
    assert _version(4) in DiskCache(root, 1).versions()


def test_an_adapter_over_the_whole_budget_is_not_kept_and_evicts_nothing(
    tmp_path: Path, one_size: int
) -> None:
    root = tmp_path / "cache"
    DiskCache(root, one_size).write(*_adapter(0))
    DiskCache(root, one_size - 1).write(*_adapter(1))
    assert DiskCache(root, one_size).versions() == {_version(0)}


def test_writing_twice_is_writing_once(tmp_path: Path) -> None:
    for _ in range(2):
        DiskCache(tmp_path, 1 << 20).write(*_adapter(0))
    assert [path.name for path in tmp_path.iterdir()] == [_version(0)]


def test_replicas_that_share_a_directory_never_read_half_an_adapter(
    tmp_path: Path, one_size: int
) -> None:
    root = tmp_path / "cache"
    problems: list[object] = []
    hits = []

    def replica(first: int) -> None:
        cache = DiskCache(root, 2 * one_size)
        for step in range(60):
            number = (first + step) % 5
            found = cache.read(_version(number))
            if found is None:
                cache.write(*_adapter(number))
            elif found != _adapter(number):
                problems.append(found)
            else:
                hits.append(number)

    threads = [threading.Thread(target=replica, args=(first,)) for first in (0, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert hits, "nothing was ever found: this test proved nothing"
    assert [path for path in root.iterdir() if path.name.startswith("~")] == []


def test_a_directory_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "cache", 1 << 20)
    cache.write(*_adapter(0))
    assert cache.read(_version(0)) is None
    assert cache.versions() == frozenset()


def test_leftovers_of_a_killed_replica_are_removed_after_an_hour(tmp_path: Path) -> None:
    young, old = tmp_path / "~young", tmp_path / "~old"
    for folder in (young, old):
        folder.mkdir()
        (folder / "file").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 3600,) * 2)
    cache = DiskCache(tmp_path, 1 << 20)
    assert young.exists() and not old.exists()
    assert cache.versions() == frozenset()


def test_leftovers_that_cannot_be_removed_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "~old"
    old.mkdir()
    os.utime(old, (time.time() - 2 * 3600,) * 2)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only file system", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    cache = DiskCache(tmp_path, 1 << 20)
    assert old.exists() and cache.versions() == frozenset()


def test_caches_that_share_a_directory_see_what_the_others_do(
    tmp_path: Path, one_size: int
) -> None:
    root = tmp_path / "cache"
    one, other = DiskCache(root, 3 * one_size), DiskCache(root, 3 * one_size)
    for number in range(4):
        (one, other)[number % 2].write(*_adapter(number))
        time.sleep(0.01)
        assert one.versions() == other.versions()
    assert one.versions() == {_version(1), _version(2), _version(3)}
    (root / _version(2) / "adapter_config.json").unlink()
    assert other.read(_version(2)) is None
    assert one.versions() == {_version(1), _version(3)}
    assert one.check_integrity() and other.check_integrity()


def test_what_another_replica_uses_is_not_the_longest_unused(tmp_path: Path, one_size: int) -> None:
    root = tmp_path / "cache"
    one, other = DiskCache(root, 2 * one_size), DiskCache(root, 2 * one_size)
    for number in (0, 1):
        one.write(*_adapter(number))
        time.sleep(0.01)
    assert other.read(_version(0)) is not None
    time.sleep(0.01)
    one.write(*_adapter(2))
    assert one.versions() == {_version(0), _version(2)}


def test_a_directory_in_which_nothing_happens_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskCache(tmp_path, 1 << 20).write(*_adapter(0))
    time.sleep(0.1)  # until the file system's clock has moved on
    cache = DiskCache(tmp_path, 1 << 20)
    held = cache.versions()

    def refuse(path: object) -> None:
        raise AssertionError(f"{path} was listed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert all(cache.versions() is held for _ in range(3))
    DiskCache(tmp_path, 1 << 20).write(*_adapter(1))
    assert cache.versions() == {_version(0), _version(1)}


def test_thousands_of_versions_are_found_again_and_the_oldest_go_first(tmp_path: Path) -> None:
    total = 3000
    names = [f"{number:064x}" for number in range(total)]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(1000))
        os.utime(tmp_path / name, ns=(number, number))
    cache = DiskCache(tmp_path, total * 1000)
    assert len(cache.versions()) == total
    for number in range(4):  # of a little over 2,000 bytes each
        cache.write(*_adapter(number))
    gone = {name for name in names if not (tmp_path / name).exists()}
    assert 8 <= len(gone) <= 12 and gone == set(names[: len(gone)])
    assert cache.versions() == set(names) - gone | {_version(number) for number in range(4)}
    assert cache.check_integrity()
