from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from tests.workers.compiled import compiler
from workers.compiled import library
from workers.compiled.library import compiled_loops
from workers.models.arithmetic import choose_arithmetic
from workers.row_form.adapted_product import adapted_product


@pytest.fixture
def _a_compiler() -> None:
    compiler.library()


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("_a_compiler")
def test_the_library_is_compiled_once_and_found_again(tmp_path: Path) -> None:
    assert compiled_loops.__wrapped__() is not None
    (made,) = tmp_path.rglob("*.so")
    written = made.stat().st_mtime_ns
    assert compiled_loops.__wrapped__() is not None
    assert [path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")] == [written]


@pytest.mark.usefixtures("_a_compiler")
def test_replicas_that_start_together_all_get_a_whole_library(tmp_path: Path) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(compiled_loops.__wrapped__()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert None not in found
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_without_a_compiler_torch_does_it_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert compiled_loops.__wrapped__() is None
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_and_lived_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING):
        assert compiled_loops.__wrapped__() is None
    assert "no such flag" in caplog.text


def test_compiled_false_uses_torch_only() -> None:
    arithmetic = choose_arithmetic(torch.float32, torch.device("cpu"), head_dim=64, compiled=False)
    assert arithmetic.product is adapted_product
    assert arithmetic.slabs is None
