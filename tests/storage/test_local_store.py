"""What only the directory promises: it survives its writers being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.errors import StoreUnavailableError
from storage.local_store import LocalObjectStore
from storage.object_store import PreconditionFailedError

_REPOSITORY = Path(__file__).parents[2]

_KILLED_BEFORE = """
import os, signal, sys
from pathlib import Path
from storage.local_store import LocalObjectStore

store = LocalObjectStore(Path(sys.argv[1]))
etag = store.get("old").etag

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

{step} = die
store.{write}
"""


@pytest.mark.parametrize(
    "write",
    [
        "put('old', b'half')",
        "put_if_absent('new', b'half')",
        "compare_and_swap('old', b'half', etag)",
    ],
)
@pytest.mark.parametrize("step", ["os.fsync", "Path.replace"])
def test_a_writer_killed_before_its_rename_changed_nothing(
    tmp_path: Path, step: str, write: str
) -> None:
    store = LocalObjectStore(tmp_path)
    etag = store.put_if_absent("old", b"before")
    script = _KILLED_BEFORE.format(step=step, write=write)
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=_REPOSITORY, timeout=60
    )
    assert child.returncode == -signal.SIGKILL
    assert store.get("old").data == b"before"
    assert [entry.key for entry in store.list("")] == ["old"]
    # The dead process holds no lock and its leftovers are in nobody's way.
    store.put_if_absent("new", b"after")
    store.compare_and_swap("old", b"after", etag)
    assert store.get("old").data == b"after"


def test_a_leftover_of_a_killed_writer_is_removed_after_a_day(tmp_path: Path) -> None:
    LocalObjectStore(tmp_path)
    young, old = tmp_path / "~writing" / "young", tmp_path / "~writing" / "old"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    LocalObjectStore(tmp_path)
    assert young.exists() and not old.exists()


def test_a_lost_write_leaves_no_file(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    store.put_if_absent("a", b"1")
    with pytest.raises(PreconditionFailedError):
        store.put_if_absent("a", b"2")
    assert list((tmp_path / "~writing").iterdir()) == []


def test_a_reader_never_sees_half_a_write(tmp_path: Path) -> None:
    writer = """
import sys
from pathlib import Path
from storage.local_store import LocalObjectStore
store = LocalObjectStore(Path(sys.argv[1]))
for number in range(150):
    store.put("big", bytes([number]) * 200_000)
"""
    store = LocalObjectStore(tmp_path)
    store.put("big", b"\0" * 200_000)
    child = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], cwd=_REPOSITORY)
    seen = set()
    while child.poll() is None:
        data = store.get("big").data
        assert len(data) == 200_000 and len(set(data)) == 1
        seen.add(data[0])
    assert child.returncode == 0
    assert len(seen) > 1, "the reader never met the writer: this test proved nothing"


def test_what_the_file_system_refuses_is_told_as_an_unavailable_store(tmp_path: Path) -> None:
    store = LocalObjectStore(tmp_path)
    store.put("a", b"1")
    with pytest.raises(StoreUnavailableError, match="cannot be written"):
        store.put("a/b", b"the key's folder is an object")
    (tmp_path / "~writing").rmdir()
    with pytest.raises(StoreUnavailableError, match="cannot be written: No such file"):
        store.put("b", b"1")
