"""What adapters are about to be published as, written down first, so that all attempts of a job publish the same.

jobs/<job>/checkpoints/finished/<adapter>.zip
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

from storage.errors import AdapterCorruptError
from storage.index import parallel
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError


class FinishedFiles:
    """One job's. Methods raise StoreUnavailableError.

    Args:
        folder: of the job's checkpoints, with its slash.
    """

    def __init__(self, store: ObjectStore, folder: str) -> None:
        self._store = store
        self._folder = f"{folder}finished/"

    def put_first(self, adapter: str, files: Mapping[str, bytes]) -> bool:
        """Write an adapter's files down; False, and nothing written, when somebody did before."""
        try:
            self._store.put_if_absent(self._key(adapter), _zipped(files))
        except PreconditionFailedError:
            return False
        return True

    def get(self, adapter: str) -> Mapping[str, bytes] | None:
        """Raises AdapterCorruptError."""
        try:
            data = self._store.get(self._key(adapter)).data
        except ObjectNotFoundError:
            return None
        try:
            return _unzipped(data)
        except zipfile.BadZipFile as error:
            raise AdapterCorruptError(f"{self._key(adapter)}: {error}") from error

    def names(self) -> frozenset[str]:
        """Adapters whose files are kept."""
        keys = (info.key for info in self._store.list(self._folder))
        return frozenset(key.removeprefix(self._folder).removesuffix(".zip") for key in keys)

    def forget(self, adapter: str) -> None:
        """To be called when an adapter is over."""
        self._store.delete(self._key(adapter))

    def forget_all(self) -> None:
        """To be called when the job is over: the registry has them all."""
        parallel(self.forget, sorted(self.names()))

    def _key(self, adapter: str) -> str:
        return f"{self._folder}{adapter}.zip"


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return buffer.getvalue()


def _unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {path: archive.read(path) for path in archive.namelist()}
