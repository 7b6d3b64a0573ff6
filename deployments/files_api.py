"""/v1/files: examples that jobs train on, as OpenAI keeps files. A file is its tenant's alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from deployments import fine_tuning_examples as examples
from deployments.api import api_of, caller_of
from deployments.query import check_query
from storage.errors import InvalidRequestError, NotFoundError, UnsupportedFieldError
from training.service.files import PURPOSE, UploadedFile

FILES_PATH = "/v1/files"

router = APIRouter(prefix=FILES_PATH, tags=["files"])


@router.post("", responses=examples.FILE, openapi_extra=examples.UPLOAD)
async def upload(request: Request) -> dict[str, Any]:
    """Keep a file of examples: `purpose` fine-tune, and `file`, as multipart/form-data.

    The same file again is the same file. What is in it is looked at when a job is to use it.
    """
    training, tenant = api_of(request).training, caller_of(request).tenant
    with training.uploads.place() as receiver:
        received = await receiver.receive(request)
        purpose = received.fields.get("purpose")
        if purpose != PURPOSE:
            raise UnsupportedFieldError(
                f"purpose: files are kept for {PURPOSE!r} only", param="purpose"
            )
        content = received.files.get("file")
        if content is None:
            raise InvalidRequestError("the field file is missing", param="file")
        filename = received.filenames["file"]
        file = await asyncio.to_thread(training.files.add, tenant, filename, content)
    return file_view(file)


@router.get("", responses=examples.FILES)
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Annotated[str | None, Query(max_length=128)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The tenant's files, newest first unless `order` is asc."""
    check_query(request, "purpose", "limit", "after", "order")
    training, tenant = api_of(request).training, caller_of(request).tenant
    files = await asyncio.to_thread(training.files.of, tenant)
    if order == "asc":
        files.reverse()
    if purpose not in (None, PURPOSE):
        files = []
    if after is not None:
        ids = [file.file_id for file in files]
        if after not in ids:
            raise NotFoundError(f"the file {after!r} does not exist", param="after")
        files = files[ids.index(after) + 1 :]
    shown = [file_view(file) for file in files[:limit]]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(files) > limit,
    }


@router.get("/{file_id}", responses=examples.FILE)
async def show_file(request: Request, file_id: str) -> dict[str, Any]:
    return file_view(await _file(request, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def file_content(request: Request, file_id: str) -> StreamingResponse:
    """The file as it was uploaded."""
    file = await _file(request, file_id)
    pieces = api_of(request).training.files.content(file)
    # Before the response begins, so that what cannot be read is an error and not a broken answer.
    first = await asyncio.to_thread(next, pieces, b"")
    return StreamingResponse(
        _chained(first, pieces),
        media_type="application/octet-stream",
        headers={
            "Content-Length": str(file.num_bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename)}",
        },
    )


@router.delete("/{file_id}", responses=examples.DELETED_FILE)
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """Forget a file. Jobs that began to train with it have a copy of their own."""
    training, tenant = api_of(request).training, caller_of(request).tenant
    await asyncio.to_thread(training.files.delete, tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_view(file: UploadedFile) -> dict[str, Any]:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_s),
        "filename": file.filename,
        "purpose": PURPOSE,
        "status": "processed",
    }


async def _file(request: Request, file_id: str) -> UploadedFile:
    training, tenant = api_of(request).training, caller_of(request).tenant
    return await asyncio.to_thread(training.files.get, tenant, file_id)


async def _chained(first: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    piece = first
    while piece:
        yield piece
        piece = await asyncio.to_thread(next, rest, b"")
