"""Files on their way in: from a request's body to unnamed temporary files, never more than is allowed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO

from fastapi import Request

from deployments.errors import BodyTooLargeError
from deployments.multipart import MultipartReader, PartStart
from storage.adapter_directory import ADAPTER_FILES
from storage.errors import AdapterRefusedError, InvalidRequestError, OverloadedError

_MAX_FIELD_BYTES = 1024
_BESIDE_THE_FILES_BYTES = 1 << 20  # of a body: boundaries, fields, a README that is passed over


@dataclass(frozen=True, slots=True)
class Form:
    """What a multipart body may hold: `fields`, and files.

    `file_of` says under which name a file is kept; None passes it over. Raises InvalidRequestError to refuse it.
    """

    fields: frozenset[str]
    file_of: Callable[[PartStart], str | None]


def _adapter_file(part: PartStart) -> str | None:
    # Some clients send the directory with it.
    name = (part.filename or "").replace("\\", "/").rpartition("/")[2]
    return name if name in ADAPTER_FILES else None


ADAPTER_FORM = Form(frozenset({"name", "alias", "tenant"}), _adapter_file)


@dataclass
class Upload:
    """What came: fields by name, files by the names they are kept under, and what the client called those."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, IO[bytes]] = field(default_factory=dict)
    filenames: dict[str, str] = field(default_factory=dict)

    def read(self) -> dict[str, bytes]:
        """The files' bytes by name. Raises AdapterRefusedError when none of them is an adapter's."""
        if not self.files:
            raise AdapterRefusedError(
                f"the upload holds no adapter: {' and '.join(ADAPTER_FILES)} are expected as files"
            )
        read = {}
        for name, file in self.files.items():
            file.seek(0)
            read[name] = file.read()
        return read


class Uploads:
    """Bodies being received: at most `at_once` of at most `max_bytes` of files each lie on this machine's disk.

    What lies there has no name in any directory, so that it is gone with the request, whatever ends it.
    """

    def __init__(self, max_bytes: int, at_once: int = 4, form: Form = ADAPTER_FORM) -> None:
        self._max_bytes = max_bytes
        self._free = at_once
        self._form = form

    @contextmanager
    def place(self) -> Iterator[_Receiver]:
        """Room for one upload, given back with all it holds at the end of the block. Raises OverloadedError."""
        if not self._free:
            raise OverloadedError("too many files are being uploaded; try again in a moment")
        self._free -= 1
        try:
            with ExitStack() as files:
                yield _Receiver(files, self._max_bytes, self._form)
        finally:
            self._free += 1


class _Receiver:
    def __init__(self, files: ExitStack, max_bytes: int, form: Form) -> None:
        self._files = files
        self._max_bytes = max_bytes
        self._form = form
        self._upload = Upload()
        self._fields: dict[str, bytearray] = {}
        self._target: IO[bytes] | str | None = None

    async def receive(self, request: Request) -> Upload:
        """The whole body.

        Raises:
            BodyTooLargeError: as soon as that is known.
            InvalidRequestError: not multipart, cut short, a field that is not known, or a file that comes twice.
        """
        limit = self._max_bytes + _BESIDE_THE_FILES_BYTES
        self._check(int(request.headers.get("content-length", 0)), limit)
        reader = MultipartReader(request.headers.get("content-type", ""))
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            self._check(num_bytes, limit)
            for event in reader.feed(chunk):
                if isinstance(event, PartStart):
                    self._target = self._open(event)
                else:
                    self._take(event.data)
        reader.finish()
        for name, value in self._fields.items():
            self._upload.fields[name] = value.decode("utf-8", "replace")
        return self._upload

    def _check(self, num_bytes: int, limit: int) -> None:
        if num_bytes > limit:
            raise BodyTooLargeError(
                f"the upload is larger than the {self._max_bytes:,} bytes that are allowed"
            )

    def _open(self, part: PartStart) -> IO[bytes] | str | None:
        """Where a part's bytes go: a field, a file, or for files that nobody wants nowhere."""
        if part.filename is None:
            if part.name not in self._form.fields:
                raise InvalidRequestError(f"there is no field {part.name!r}", param=part.name[:64])
            self._fields[part.name] = bytearray()
            return part.name
        name = self._form.file_of(part)
        if name is None:
            return None
        if name in self._upload.files:
            raise InvalidRequestError(f"the file {name} comes twice", param=name)
        file = tempfile.TemporaryFile()  # noqa: SIM115  closed with all others of the upload
        self._upload.files[name] = self._files.enter_context(file)
        self._upload.filenames[name] = part.filename
        return file

    def _take(self, data: bytes) -> None:
        if isinstance(self._target, str):
            field = self._fields[self._target]
            field += data
            if len(field) > _MAX_FIELD_BYTES:
                raise InvalidRequestError(f"{self._target} is too long", param=self._target)
        elif self._target is not None:
            self._target.write(data)
