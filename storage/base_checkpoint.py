"""What adapters must know of a base model: its identity and its linear projections, from the files alone.

The digest is of the checkpoint's tensors, not of its files and not of loaded tensors: another sharding is the same
base, another dtype or another name of a tensor is another one. A GGUF file's is of the file (`gguf_file.py`).
Needs no torch; knows no model hub.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import base_layout
from storage.errors import InvalidRequestError
from storage.gguf_file import find_gguf, gguf_digest, read_gguf_projections
from storage.identity import canonical_json, sha256_hex
from storage.safetensors_file import MalformedFileError, TensorEntry, read_header

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A base model as adapters see it.

    `projections`: module path → (in, out) features, of every linear layer but the embeddings and the output head.
    `are_layers_known`: if not, the architecture is one whose checkpoints we do not know: the projections are what its
    tensors look like, and only the loaded model can tell.
    """

    digest: str
    name: str
    projections: dict[str, tuple[int, int]]
    are_layers_known: bool = True


def read_base_facts(directory: Path, name: str = "") -> BaseFacts:
    """Read a checkpoint, whole: time is that of hashing its bytes.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`, or one GGUF file; or is
            a GGUF file itself.
        name: what to call the base; the directory's name if empty.

    Raises:
        InvalidRequestError: there is no such checkpoint, a file of it is missing or damaged, two files hold the same
            tensor, or a GGUF file is of an architecture that is not known.
    """
    gguf = find_gguf(directory)
    if gguf is not None:
        projections = read_gguf_projections(gguf)
        return BaseFacts(gguf_digest(gguf), name or gguf.stem, projections)
    described: list[tuple[str, tuple[int, ...], str, str]] = []
    seen: set[str] = set()
    for path in _checkpoint_files(directory):
        for tensor_name, entry, sha256 in _hashed_tensors(path):
            if tensor_name in seen:
                raise _refused(f"two files hold the tensor {tensor_name!r}")
            seen.add(tensor_name)
            described.append((tensor_name, entry.shape, entry.dtype, sha256))
    described.sort()
    model_type = _model_type(directory)
    return BaseFacts(
        digest=sha256_hex(canonical_json(described)),
        name=name or directory.name,
        projections=base_layout.projections(
            model_type, [(tensor_name, shape) for tensor_name, shape, _, _ in described]
        ),
        are_layers_known=base_layout.is_known(model_type),
    )


def _model_type(directory: Path) -> str | None:
    try:
        model_type = json.loads((directory / _CONFIG).read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model_type if isinstance(model_type, str) else None


def _checkpoint_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        return [directory / _SINGLE]
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _refused(f"{_INDEX} is not a list of shards") from None
    if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
        raise _refused(f"{_INDEX} names files outside the directory")
    return [directory / shard for shard in sorted(shards)]


def _hashed_tensors(path: Path) -> Iterator[tuple[str, TensorEntry, str]]:
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            for name, entry in read_header(data).tensors.items():
                with data[entry.start : entry.stop] as tensor:
                    yield name, entry, hashlib.sha256(tensor).hexdigest()
    except FileNotFoundError:
        raise _refused(f"{path.name} is missing; a safetensors checkpoint is needed") from None
    except (MalformedFileError, ValueError) as error:
        raise _refused(f"{path.name} is damaged: {error}") from None


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the base model cannot be read: {reason}", param="base")
