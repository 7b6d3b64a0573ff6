"""A base model as one GGUF file: where it is, what it is called, which layers it has.

Its identity is that of the file. The same model as safetensors is another base: unpacking rounds, and adapters that
multiply the base's weights are bound to the values they were made for.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from storage.base_layout import GGUF_ARCHITECTURES, gguf_projections
from storage.errors import InvalidRequestError
from storage.identity import canonical_json, sha256_hex

SUFFIX = ".gguf"
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in a directory that is not a model in transformers' layout.

    Raises:
        InvalidRequestError: there are several to choose from, or it is one of several parts.
    """
    if path.is_file() and path.suffix == SUFFIX:
        found = [path]
    elif path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob(f"*{SUFFIX}"))
    else:
        return None
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise _refused(f"{path.name} holds several GGUF files; name one of {names}")
    if found and _PART.fullmatch(found[0].name):
        raise _refused(f"{found[0].name} is a part of a divided file; merge the parts first")
    return found[0] if found else None


def gguf_digest(file: Path) -> str:
    """sha256 over the canonical JSON of ["gguf", sha256 of the file]: no safetensors checkpoint can have the same."""
    with file.open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    return sha256_hex(canonical_json(["gguf", content]))


def read_gguf_projections(file: Path) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) features of every linear layer but the embeddings and the output head.

    Raises:
        InvalidRequestError: not a GGUF file, or of an architecture whose layers are not known.
    """
    from gguf import GGUFReader  # slow to import, and needed for such files only

    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise _refused(f"{file.name} is damaged or no GGUF file: {error}") from None
    if architecture not in GGUF_ARCHITECTURES:
        raise _refused(
            f"{file.name} is of the architecture {architecture!r}; as GGUF only "
            f"{', '.join(GGUF_ARCHITECTURES)} are read. Convert it to safetensors"
        )
    return gguf_projections(
        architecture,
        [(tensor.name, tuple(int(size) for size in tensor.shape)) for tensor in reader.tensors],
    )


def _refused(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the base model cannot be read: {reason}", param="base")
