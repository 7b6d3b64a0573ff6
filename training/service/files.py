"""Files that users uploaded, in the registry's store: `files/<tenant>/<id>/`, a record and the bytes in parts.

A file's id is made of what it is, so that the same file uploaded again, by a client that got no answer, is the same
file. The parts come before the record, which is the commit; in between no file is held in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field

from storage.errors import (
    AdapterCorruptError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
)
from storage.identity import canonical_json
from storage.index import parallel
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError
from storage.records import encode, read

PURPOSE = "fine-tune"
_PART_BYTES = 8 << 20
_RECORD = "record.json"
_ID_DIGITS = 24
_LONGEST_NAME = 60  # of characters that may have four bytes each


class UploadedFile(BaseModel):
    """A file's record. It never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_id: str
    tenant: str
    filename: str
    num_bytes: int
    sha256: str
    created_s: float = Field(description="Seconds since the epoch.")

    @property
    def num_parts(self) -> int:
        return max(1, -(-self.num_bytes // _PART_BYTES))


class UploadedFiles:
    """Every method blocks, and raises StoreUnavailableError when the store cannot be reached.

    Args:
        clock: seconds since the epoch.
        bytes_per_tenant: of all files that a tenant has at once; as many as it likes when None. Uploads of one tenant
            at the same moment may together exceed it, by what was sent in that moment.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Callable[[], float],
        bytes_per_tenant: int | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._bytes_per_tenant = bytes_per_tenant

    def add(self, tenant: str, filename: str, content: IO[bytes]) -> UploadedFile:
        """Keep a file, read from its beginning.

        Raises:
            InvalidRequestError: a name that no file could have.
            QuotaExceededError: the tenant has no room for another file of this size.
            OverloadedError: the same file is being deleted; nothing is kept.
        """
        filename = _checked_filename(filename)
        content.seek(0)
        digest = hashlib.sha256()
        while piece := content.read(_PART_BYTES):
            digest.update(piece)
        sha256 = digest.hexdigest()
        name = hashlib.sha256(canonical_json([tenant, filename, PURPOSE, sha256])).hexdigest()
        file = UploadedFile(
            file_id=f"file-{name[:_ID_DIGITS]}",
            tenant=tenant,
            filename=filename,
            num_bytes=content.tell(),
            sha256=sha256,
            created_s=self._clock(),
        )
        self._check_room(file)
        content.seek(0)
        for number in range(file.num_parts):
            self._store.put(_part(file, number), content.read(_PART_BYTES))
        try:
            self._store.put_if_absent(_record(tenant, file.file_id), encode(file))
        except PreconditionFailedError:
            file = self.get(tenant, file.file_id)
        if not all(self._store.exists(_part(file, number)) for number in range(file.num_parts)):
            self._store.delete(_record(tenant, file.file_id))
            raise OverloadedError("the same file was deleted at this moment; upload it again")
        return file

    def get(self, tenant: str, file_id: str, *, param: str = "file_id") -> UploadedFile:
        """Raises NotFoundError, about the field `param`."""
        found = None
        if _is_id(file_id):
            found = read(self._store, _record(tenant, file_id), UploadedFile)
        if found is None:
            raise NotFoundError(f"the file {file_id!r} does not exist", param=param)
        return found

    def of(self, tenant: str) -> list[UploadedFile]:
        """All of a tenant's, newest first."""
        keys = [
            one.key for one in self._store.list(f"files/{tenant}/") if one.key.endswith(_RECORD)
        ]
        found = parallel(lambda key: read(self._store, key, UploadedFile), keys)
        files = [one for one in found if one is not None]
        return sorted(files, key=lambda file: (-file.created_s, file.file_id))

    def num_bytes(self, tenant: str) -> int:
        """Of all of a tenant's, without what is on its way."""
        sizes: Counter[str] = Counter()
        kept = set()
        for one in self._store.list(f"files/{tenant}/"):
            folder, _, name = one.key.rpartition("/")
            if name == _RECORD:
                kept.add(folder)
            else:
                sizes[folder] += one.num_bytes
        return sum(sizes[folder] for folder in kept)

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFoundError. Of an upload of the same file at the same moment nothing is left either."""
        file = self.get(tenant, file_id)
        self._store.delete(_record(tenant, file_id))
        for number in range(file.num_parts):
            self._store.delete(_part(file, number))
        # Uploaded once more meanwhile, it would be a record without its parts.
        self._store.delete(_record(tenant, file_id))

    def _check_room(self, file: UploadedFile) -> None:
        most = self._bytes_per_tenant
        if most is None or self._store.exists(_record(file.tenant, file.file_id)):
            return
        used = self.num_bytes(file.tenant)
        if used + file.num_bytes > most:
            raise QuotaExceededError(
                f"the files of this tenant have {used:,} bytes, and this one {file.num_bytes:,}; together {most:,} are "
                "kept at most. Delete files that no job needs any more, or ask whoever runs this server for room",
                param="file",
            )

    def content(self, file: UploadedFile) -> Iterator[bytes]:
        """The content, in pieces. Raises NotFoundError when it is deleted meanwhile, AdapterCorruptError."""
        digest = hashlib.sha256()
        for number in range(file.num_parts):
            try:
                piece = self._store.get(_part(file, number)).data
            except ObjectNotFoundError:
                raise NotFoundError(f"the file {file.file_id!r} was deleted") from None
            digest.update(piece)
            # The last piece is not given away before all of them are known to be right.
            if number == file.num_parts - 1 and digest.hexdigest() != file.sha256:
                raise AdapterCorruptError(f"the file {file.file_id!r} is damaged; upload it again")
            yield piece

    def fetch(self, file: UploadedFile, directory: Path) -> Path:
        """Copy a file into a directory, under its own name. Raises as `content`."""
        path = directory / file.filename
        with path.open("wb") as copy:
            for piece in self.content(file):
                copy.write(piece)
        return path


def _checked_filename(text: str) -> str:
    """Without the directories some clients send along."""
    name = text.replace("\\", "/").rpartition("/")[2]
    if not name.isprintable() or name in ("", ".", "..") or len(name) > _LONGEST_NAME:
        raise InvalidRequestError(
            f"a file's name is 1 to {_LONGEST_NAME} printable characters", param="file"
        )
    return name


def _is_id(text: str) -> bool:
    digits = text.removeprefix("file-")
    return text.startswith("file-") and digits.isalnum() and digits.isascii()


def _record(tenant: str, file_id: str) -> str:
    return f"files/{tenant}/{file_id}/{_RECORD}"


def _part(file: UploadedFile, number: int) -> str:
    return f"files/{file.tenant}/{file.file_id}/{number:05}"
