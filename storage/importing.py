"""Many adapters at once, from a folder of them. May be stopped and run again: what is there already stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from storage.adapter_source import AdapterSource
from storage.base_checkpoint import BaseFacts
from storage.config import DEFAULT_MAX_ADAPTER_BYTES
from storage.errors import (
    AdapterCorruptError,
    AdapterRefusedError,
    BaseMismatchError,
    InvalidRequestError,
    UnknownModelError,
)
from storage.identity import DEFAULT_ALIAS, AdapterName, AdapterVersion, sha256_hex
from storage.publishing import publish_adapter
from storage.registry import Registry


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of one folder. `what` is the reason where it was refused, or a warning."""

    folder: str
    name: str
    outcome: Literal["imported", "unchanged", "refused"]
    version: AdapterVersion | None = None
    what: str = ""


def import_adapters(
    registry: Registry,
    source: AdapterSource,
    tenant: str,
    base: BaseFacts,
    *,
    place_name: str = "",
    alias: str = DEFAULT_ALIAS,
    max_bytes: int = DEFAULT_MAX_ADAPTER_BYTES,
) -> Iterator[Imported]:
    """Publish the adapter of every folder under the folder's name; one that is refused hinders no other.

    Args:
        place_name: what the adapter is called that lies in the place itself and in no folder of it.
        alias: what each new version is called. One that means the same files on the same base already stays.

    Yields:
        One outcome for each folder, as soon as it is known.

    Raises:
        StoreUnavailableError: the registry or the source cannot be reached; running it again goes on from there.
    """
    taken: dict[str, str] = {}
    for folder in source.folders():
        name = adapter_name_of(folder, place_name)
        if name in taken:
            yield Imported(folder, name, "refused", what=f"{taken[name]} has the same name")
            continue
        taken[name] = folder
        try:
            adapter = AdapterName(tenant, name)
            files = source.read(folder)
            present = _present(registry, adapter, alias, files, base)
            if present is not None:
                yield Imported(folder, name, "unchanged", present)
                continue
            manifest = publish_adapter(
                registry, adapter, files, base, alias=alias, source="import", max_bytes=max_bytes
            )
        except (
            InvalidRequestError,
            AdapterRefusedError,
            BaseMismatchError,
            AdapterCorruptError,
        ) as error:
            yield Imported(folder, name, "refused", what=error.message)
        else:
            warnings = "; ".join(manifest.provenance.warnings)
            yield Imported(folder, name, "imported", manifest.version, warnings)


def adapter_name_of(folder: str, place_name: str) -> str:
    """`runs/captain` → `runs-captain`: the folder's path with what separates it replaced."""
    return "-".join(PurePosixPath(folder).parts) or place_name


def _present(
    registry: Registry, name: AdapterName, alias: str, files: dict[str, bytes], base: BaseFacts
) -> AdapterVersion | None:
    """The version that the alias means, if it is of these files and this base."""
    try:
        version = registry.resolve(name, alias)
        content = registry.manifest(name, version).content
    except (UnknownModelError, AdapterCorruptError):
        return None
    digests = {path: entry.sha256 for path, entry in content.files.items()}
    is_same = digests == {path: sha256_hex(data) for path, data in files.items()}
    return version if is_same and content.base_digest == base.digest else None
