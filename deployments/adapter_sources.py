"""Places outside the registry that an adapter may be taken from: only those the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deployments.errors import ForbiddenSourceError
from storage.adapter_directory import ADAPTER_FILES
from storage.adapter_source import S3_SCHEME, open_source
from storage.config import StorageSettings
from storage.errors import InvalidRequestError, NoAdapterError


class AdapterSources:
    """Reads directories on this machine and prefixes in S3, as far as they are allowed.

    Args:
        allowed: absolute directories and `s3://bucket/prefix`; what lies below one is allowed with it.
        storage: endpoint and limits; S3 is reached as the registry is.
    """

    def __init__(self, allowed: Sequence[str], storage: StorageSettings) -> None:
        self._prefixes = [place.rstrip("/") for place in allowed if place.startswith(S3_SCHEME)]
        self._directories = [
            Path(place).resolve() for place in allowed if not place.startswith(S3_SCHEME)
        ]
        self._storage = storage

    def read(self, location: str) -> dict[str, bytes]:
        """The files of the adapter at a location, by name. Blocks.

        Raises:
            ForbiddenSourceError: the location is not below an allowed one.
            NoAdapterError: there is none.
            AdapterRefusedError: it is larger than what is accepted.
            StoreUnavailableError: S3 cannot be reached.
        """
        if location.startswith(S3_SCHEME):
            is_allowed = self._allows_prefix(location)
        elif "://" in location:
            raise InvalidRequestError(
                f"{location!r} is neither a directory nor s3://bucket/prefix", param="source"
            )
        else:
            is_allowed = self._allows_directory(Path(location))
        if not is_allowed:
            raise ForbiddenSourceError(
                f"{location} is not below a place this server takes adapters from (setting serve.adapter_sources)",
                param="source",
            )
        if not location.startswith(S3_SCHEME) and not Path(location).is_dir():
            raise NoAdapterError(f"{location} is not a directory", param="source")
        return open_source(location, self._storage).read("")

    def _allows_prefix(self, location: str) -> bool:
        parts = location.removeprefix(S3_SCHEME).rstrip("/").split("/")
        is_plain = all(part not in ("", ".", "..") for part in parts)
        return is_plain and any(
            location == place or location.startswith(f"{place}/") for place in self._prefixes
        )

    def _allows_directory(self, directory: Path) -> bool:
        """Links are followed first: what one leads to must be allowed itself."""
        places = [directory.resolve(), *((directory / name).resolve() for name in ADAPTER_FILES)]
        return directory.is_absolute() and all(
            any(place.is_relative_to(allowed) for allowed in self._directories) for place in places
        )
