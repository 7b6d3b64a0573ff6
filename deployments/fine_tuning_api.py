"""/v1/fine_tuning/jobs: one job is one adapter, trained on uploaded files. A job is its tenant's alone."""

from __future__ import annotations

import asyncio
import time
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request

from deployments import fine_tuning_examples as examples
from deployments.api import Api, api_of, caller_of
from deployments.errors import AdminOnlyError, JobEndedError, NameTakenError
from deployments.fine_tuning_schema import CreateJob
from deployments.fine_tuning_views import checkpoints_view, event_us, events_view, job_view
from deployments.query import check_query
from storage.errors import InvalidRequestError, NotFoundError
from storage.identity import AdapterName
from training.service.job import FineTuningJob

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=128, description="The last id of a page.")]


@router.post("", responses=examples.JOB)
async def create(
    request: Request,
    body: CreateJob,
    idempotency_key: Annotated[str | None, Header(max_length=256)] = None,
) -> dict[str, Any]:
    """Train an adapter. With an `Idempotency-Key`, the same request sent again is the same job.

    A user's key makes new adapters; a new version of one that exists needs an admin's.
    """
    api, caller = api_of(request), caller_of(request)
    training, tenant = api.training, caller.tenant
    await _check_model(api, body.model, tenant)
    asked = body.request(tenant, api.base_id, training.base)
    # The desk asks again: an adapter of that name may be made until then.
    asked = asked.model_copy(update={"may_replace": caller.is_admin})
    if asked.suffix == api.base_id:
        raise NameTakenError(f"{asked.suffix!r} is the name of the base model", param="suffix")

    def add() -> FineTuningJob:
        for param in ("training_file", "validation_file"):
            file_id = getattr(asked, param)
            if file_id is not None:
                _check_file(api, tenant, file_id, param)
        is_repeated = idempotency_key and training.records.has_request(tenant, idempotency_key)
        if not is_repeated:
            training.records.check_room(api.base_id, tenant, training.jobs_per_tenant)
        if asked.suffix is not None and not caller.is_admin and not is_repeated:
            _check_new(api, AdapterName(tenant, asked.suffix))
            if training.records.is_awaited(api.base_id, tenant, asked.suffix):
                raise NameTakenError(
                    f"another job is making an adapter {asked.suffix!r}; choose another suffix, or "
                    "wait for it or cancel it",
                    param="suffix",
                )
        return training.records.create(asked, time.time(), idempotency_key)

    job = await asyncio.to_thread(add)
    training.nudge()
    return job_view(job)


@router.get("", responses=examples.JOBS)
async def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """The tenant's jobs, newest first."""
    check_query(request, "after", "limit")
    training, tenant = api_of(request).training, caller_of(request).tenant

    def read() -> tuple[list[FineTuningJob], bool]:
        if after is not None:
            training.records.get(tenant, after)
        return training.records.page(tenant, after, limit)

    jobs, has_more = await asyncio.to_thread(read)
    return _page([job_view(job) for job in jobs], has_more)


@router.get("/{job_id}", responses=examples.JOB)
async def show(request: Request, job_id: str) -> dict[str, Any]:
    return job_view(await _job(request, job_id))


@router.post("/{job_id}/cancel", responses=examples.JOB)
async def cancel(request: Request, job_id: str) -> dict[str, Any]:
    """Stop a job; others that train with it go on."""
    training = api_of(request).training
    job = await _job(request, job_id)
    if job.status.is_final:
        raise JobEndedError(f"the job {job_id} has {job.status.value} already")
    job = await asyncio.to_thread(
        training.records.change, job, lambda current: current.cancelled(time.time())
    )
    training.nudge()
    return job_view(job)


@router.get("/{job_id}/events", responses=examples.EVENTS)
async def list_events(
    request: Request, job_id: str, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """What happened, newest first: every step with its loss among it. A page costs what is in it."""
    check_query(request, "after", "limit")
    training, tenant = api_of(request).training, caller_of(request).tenant

    def read() -> dict[str, Any]:
        job = training.records.get(tenant, job_id)
        told = training.events(job, None if after is None else event_us(after))
        shown = list(islice(events_view(job, told, after), limit + 1))
        return _page(shown[:limit], len(shown) > limit)

    return await asyncio.to_thread(read)


@router.get("/{job_id}/checkpoints", responses=examples.CHECKPOINTS)
async def list_checkpoints(
    request: Request, job_id: str, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """The version that the job published, under a name that means no other one."""
    check_query(request, "after", "limit")
    training, tenant = api_of(request).training, caller_of(request).tenant

    def read() -> dict[str, Any]:
        job = training.records.get(tenant, job_id)
        return _after(checkpoints_view(job, training.events(job)), after, limit)

    return await asyncio.to_thread(read)


async def _job(request: Request, job_id: str) -> FineTuningJob:
    training, tenant = api_of(request).training, caller_of(request).tenant
    return await asyncio.to_thread(training.records.get, tenant, job_id)


async def _check_model(api: Api, model: str, tenant: str) -> None:
    """Raises UnknownModelError, or InvalidRequestError for an adapter: training begins at the base."""
    if model in (api.base_id, api.training.base):
        return
    await api.names.resolve(model, tenant)
    raise InvalidRequestError(
        f"{model!r} is an adapter; training begins at the base model {api.base_id!r}", param="model"
    )


def _check_new(api: Api, adapter: AdapterName) -> None:
    if api.admin.exists(adapter):
        raise AdminOnlyError(
            f"the adapter {adapter.name!r} exists; training a new version of it needs an admin key",
            param="suffix",
        )


def _check_file(api: Api, tenant: str, file_id: str, param: str) -> None:
    try:
        api.training.files.get(tenant, file_id)
    except NotFoundError as error:
        raise InvalidRequestError(error.message, param=param) from None


def _page(shown: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": has_more,
    }


def _after(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of a whole list. Raises InvalidRequestError when `after` is none of it."""
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError(f"there is nothing with the id {after!r}", param="after")
        start = ids.index(after) + 1
    return _page(items[start : start + limit], len(items) > start + limit)
