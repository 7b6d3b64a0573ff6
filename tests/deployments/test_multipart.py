"""A multipart body is read the same however it is cut into chunks, and a broken one is refused."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.multipart import MultipartReader, PartData, PartStart
from storage.errors import InvalidRequestError

Parts = list[tuple[str, str | None, bytes]]


def read(content_type: str, chunks: list[bytes]) -> Parts:
    reader = MultipartReader(content_type)
    parts: Parts = []
    for chunk in chunks:
        for event in reader.feed(chunk):
            if isinstance(event, PartStart):
                parts.append((event.name, event.filename, b""))
            else:
                assert isinstance(event, PartData)
                name, filename, data = parts[-1]
                parts[-1] = (name, filename, data + event.data)
    reader.finish()
    return parts


def body_of(fields: dict[str, str], files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """As a real client writes it."""
    request = httpx.Request(
        "POST", "http://x", data=fields, files=[("files", each) for each in files]
    )
    return request.headers["content-type"], request.read()


TRICKY = st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"\r\n--", b"--", b"\x00", b"a", b"\r\n\r\n"]), max_size=12
).map(b"".join)


@given(st.lists(TRICKY, min_size=1, max_size=3), st.data())
def test_parts_come_out_as_they_went_in_however_the_body_is_cut(
    contents: list[bytes], data: st.DataObject
) -> None:
    files = [(f"file-{number}.bin", content) for number, content in enumerate(contents)]
    content_type, body = body_of({"name": "poet"}, files)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    chunks = [body[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    expected: Parts = [("name", None, b"poet")]
    expected += [("files", name, content) for name, content in files]
    assert read(content_type, chunks) == expected
    assert read(content_type, [bytes([byte]) for byte in body]) == expected


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("application/json", b"{}", "must be multipart/form-data"),
        ("multipart/form-data", b"", "with a boundary"),
        ("multipart/form-data; boundary=b", b"", "ends before"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nhalf',
            "ends before",
        ),
        ("multipart/form-data; boundary=b", b"--bee\r\n\r\n--b--", "broken boundary"),
        ("multipart/form-data; boundary=b", b"--b\r\nA: b\r\n\r\nx\r\n--b--", "has no name"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"A" * 20_000, "too long headers"),
    ],
)
def test_a_body_that_is_not_well_formed_is_refused(
    content_type: str, body: bytes, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(content_type, [body])


def test_a_reader_holds_back_no_more_than_a_boundary() -> None:
    reader = MultipartReader("multipart/form-data; boundary=b")
    list(reader.feed(b'--b\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\n'))
    (event,) = reader.feed(b"x" * 100_000)
    assert isinstance(event, PartData) and len(event.data) > 99_990
