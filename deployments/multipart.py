"""Reads `multipart/form-data` (RFC 7578) piece by piece, as it comes over the wire. Keeps no part, knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser
from enum import Enum, auto

from storage.errors import InvalidRequestError

_MAX_HEADER_BYTES = 8 << 10
_MAX_PARTS = 64
_MAX_PADDING_BYTES = 64  # spaces that may follow a boundary
_END_OF_HEADERS = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class PartStart:
    """A part begins. `filename` is None for a plain field."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    """The next bytes of the part that began last."""

    data: bytes


class _State(Enum):
    PREAMBLE = auto()
    AFTER_DELIMITER = auto()
    HEADERS = auto()
    DATA = auto()
    EPILOGUE = auto()


class MultipartReader:
    """Feed it the body's chunks in order, then `finish`.

    Args:
        content_type: the request's header. Raises InvalidRequestError if it is not multipart with a boundary.
    """

    def __init__(self, content_type: str) -> None:
        header = Message()
        header["content-type"] = content_type
        boundary = header.get_param("boundary")
        if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
            raise InvalidRequestError("the body must be multipart/form-data with a boundary")
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._buffer = bytearray(b"\r\n")  # the first delimiter needs no line before it
        self._state = _State.PREAMBLE
        self._num_parts = 0

    def feed(self, chunk: bytes) -> Iterator[PartStart | PartData]:
        """What the chunk completes. Raises InvalidRequestError for a body that is not well formed."""
        self._buffer += chunk
        while True:
            before = self._state, len(self._buffer)
            yield from self._advance()
            if (self._state, len(self._buffer)) == before:
                return

    def finish(self) -> None:
        """Raises InvalidRequestError when the body ended early."""
        if self._state is not _State.EPILOGUE:
            raise InvalidRequestError("the multipart body ends before its last boundary")

    def _advance(self) -> Iterator[PartStart | PartData]:
        match self._state:
            case _State.PREAMBLE:
                for _ in self._to_delimiter():
                    pass
            case _State.DATA:
                yield from self._to_delimiter()
            case _State.AFTER_DELIMITER:
                self._after_delimiter()
            case _State.HEADERS:
                yield from self._headers()
            case _State.EPILOGUE:
                self._buffer.clear()

    def _to_delimiter(self) -> Iterator[PartData]:
        """All bytes that cannot belong to a delimiter."""
        at = self._buffer.find(self._delimiter)
        stop = at if at >= 0 else max(0, len(self._buffer) - len(self._delimiter) + 1)
        if stop:
            yield PartData(bytes(self._buffer[:stop]))
        if at >= 0:
            stop += len(self._delimiter)
            self._state = _State.AFTER_DELIMITER
        del self._buffer[:stop]

    def _after_delimiter(self) -> None:
        if self._buffer.startswith(b"--"):
            self._state = _State.EPILOGUE
            return
        line, end, _ = self._buffer.partition(b"\r\n")
        if end and not line.strip(b" \t"):
            del self._buffer[: len(line) + len(end)]
            self._state = _State.HEADERS
        elif end or len(line) > _MAX_PADDING_BYTES:
            raise InvalidRequestError("the multipart body has a broken boundary")

    def _headers(self) -> Iterator[PartStart]:
        end = self._buffer.find(_END_OF_HEADERS)
        if (end if end >= 0 else len(self._buffer)) > _MAX_HEADER_BYTES:
            raise InvalidRequestError("a part of the multipart body has too long headers")
        if end < 0:
            return
        headers = BytesHeaderParser().parsebytes(bytes(self._buffer[:end]))
        del self._buffer[: end + len(_END_OF_HEADERS)]
        name = headers.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise InvalidRequestError("a part of the multipart body has no name")
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidRequestError(f"the multipart body has more than {_MAX_PARTS} parts")
        self._state = _State.DATA
        yield PartStart(name, headers.get_filename())
