"""A publisher that is killed, at any step, leaves the old state or the new one; publishing again finishes the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.config import StorageSettings
from storage.errors import UnknownModelError
from storage.registry import Registry
from storage.stores import open_store
from tests.storage.versions import NAME, assert_whole, content_of, files_of, publish, version_of

_REPOSITORY = Path(__file__).parents[2]
_WRITES = ["config", "tensors", "content", "manifest", "alias", "index", "generation"]


def _registries(settings: StorageSettings) -> list[StorageSettings]:
    """One registry per step that may be the last one, and one where none is."""
    return [
        settings.model_copy(update={"registry": f"{settings.registry}/{number}"})
        for number in range(len(_WRITES) + 1)
    ]


def _publish_dying(text: str, registries: list[StorageSettings]) -> list[int]:
    arguments = [registry.model_dump_json() for registry in registries]
    output = subprocess.run(
        [sys.executable, "-m", "tests.storage.dying_publisher", text, *arguments],
        cwd=_REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    return [int(line) for line in output.split()]


@pytest.mark.parametrize(
    ("kind", "is_first"),
    [("local", True), ("local", False), ("s3", False)],
    ids=["local-first-version", "local-next-version", "s3-next-version"],
)
def test_publish_survives_a_kill_before_every_write(
    request: pytest.FixtureRequest, kind: str, is_first: bool
) -> None:
    registries = _registries(request.getfixturevalue(f"{kind}_settings"))
    opened = [Registry(open_store(registry)) for registry in registries]
    if not is_first:
        for registry in opened:
            publish(registry, "old")
    statuses = _publish_dying("new", registries)
    assert statuses == [-signal.SIGKILL] * len(_WRITES) + [0]

    old, new = version_of("old"), version_of("new")
    for num_written, registry in enumerate(opened):
        is_committed = num_written > _WRITES.index("manifest")
        is_moved = num_written > _WRITES.index("alias")
        versions = {manifest.version for manifest in registry.versions(NAME)}
        assert versions == {*([] if is_first else [old]), *([new] if is_committed else [])}
        for version in versions:
            assert_whole(registry, NAME, version)
        if is_moved:
            assert registry.resolve(NAME) == new
        elif is_first:
            with pytest.raises(UnknownModelError):
                registry.resolve(NAME)
        else:
            assert registry.resolve(NAME) == old

        before = registry.generation()
        assert publish(registry, "new") == new
        assert registry.resolve(NAME) == new
        assert registry.generation() > before
        assert registry.aliases(NAME)["latest"].generation == (1 if is_first else 2)
        assert_whole(registry, NAME, new)


def test_a_half_written_file_is_repaired_by_the_retry(settings: StorageSettings) -> None:
    """A kill may leave a blob that nobody wrote whole, on a store with weaker promises than ours."""
    store = open_store(settings)
    registry = Registry(store)
    content = content_of(files_of("new"))
    store.put(f"blobs/sha256/{content.files['adapter_model.safetensors'].sha256}", b"ne")
    assert_whole(registry, NAME, publish(registry, "new"))
