"""An adapter as a directory on disk, as PEFT saves and loads it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from storage.errors import InvalidRequestError, NoAdapterError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def read_directory(path: Path) -> dict[str, bytes]:
    """The files of the adapter, by name. Others beside them, such as a README or optimizer state, are not part of it.

    Raises:
        NoAdapterError: the directory holds no adapter.
    """
    files = {name: (path / name).read_bytes() for name in ADAPTER_FILES if (path / name).is_file()}
    if not files:
        raise NoAdapterError(f"{path} holds no adapter: {' and '.join(ADAPTER_FILES)} are expected")
    return files


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a whole directory at once: it has all the files, or does not exist.

    Raises:
        InvalidRequestError: there is something at `path` that is not an empty directory.
        ValueError: a file's name is not a plain name.
    """
    if any(Path(name).name != name or name in ("", "..") for name in files):
        raise ValueError(f"not plain file names: {sorted(files)}")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InvalidRequestError(f"{path} exists and is not an empty directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"~{path.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
