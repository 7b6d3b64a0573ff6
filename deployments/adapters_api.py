"""/v1/adapters: which adapters there are, where they lie, and how they are changed. Changes need an admin key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.state import ClusterState
from deployments import adapter_examples as examples
from deployments.adapter_views import adapter_details, adapter_view, published_view
from deployments.api import Admin, Api, api_of, caller_of
from deployments.last_good import LOOK_AGAIN_S
from deployments.model_list import encode, list_body, page_of
from deployments.models_api import After, Limit, json_response
from storage.errors import InvalidRequestError, OverloadedError, UnknownModelError
from storage.identity import DEFAULT_ALIAS, AdapterName, checked_name
from storage.manifest import AliasRecord

UPLOAD_PATH = "/v1/adapters"

router = APIRouter(prefix=UPLOAD_PATH, tags=["adapters"])

Result = TypeVar("Result")

Tenant = Annotated[
    str | None,
    Query(description="Whose adapters: the key's tenant, unless an admin names another."),
]


class RegisterRequest(BaseModel):
    """An adapter to be taken from a place the server may read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    source: str = Field(
        min_length=1, max_length=1024, description="s3://bucket/prefix, or a directory."
    )
    alias: str | None = Field(default=DEFAULT_ALIAS, description="null: the version gets no alias.")
    tenant: str | None = None


class AliasRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"example": {"version": "3f2a9c41d07b"}},
    )

    version: str = Field(description="A version, at least 8 digits of one, or an alias.")


class PinRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"example": {"copies": 2}}
    )

    copies: int = Field(ge=1, le=1024, description="On how many replicas at least.")


@router.get("", responses=examples.LIST)
async def list_adapters(
    request: Request, tenant: Tenant = None, limit: Limit = None, after: After = None
) -> Response:
    """The adapters a key may use, with versions and aliases, what each alias serves, and who has it on a device."""
    api = api_of(request)
    owner = caller_of(request).acting_for(tenant)
    models, table = await api.models.now(), api.view.table

    def body() -> bytes:
        page = page_of(models.entries(owner), after, limit)
        shown = [
            encode(adapter_view(entry.adapter, models.published, table, api.base_id))
            for entry in page.entries
        ]
        first_id, last_id = (
            (page.entries[0].id, page.entries[-1].id) if page.entries else (None, None)
        )
        return list_body(shown, first_id, last_id, page.has_more)

    return json_response(await asyncio.to_thread(body))


@router.get("/{name}", responses=examples.ADAPTER)
async def show_adapter(request: Request, name: str, tenant: Tenant = None) -> dict[str, Any]:
    """One adapter: also the history of its aliases, why one lags behind, and every tier a version lies in."""
    api = api_of(request)
    owner = caller_of(request).acting_for(tenant)
    checked_name(name)
    models = await api.models.now()
    adapter = models.find(owner, name)
    if adapter is None:
        models = await api.models.recent(LOOK_AGAIN_S)
        adapter = models.find(owner, name)
    if adapter is None:
        raise UnknownModelError(f"the adapter {name!r} does not exist", param="name")
    return adapter_details(adapter, models.published, await _state(api), api.base_id)


@router.post("", status_code=201, responses=examples.PUBLISHED, openapi_extra=examples.PUBLISH)
async def publish(request: Request, admin: Admin) -> JSONResponse:
    """Publish a version: the files of a PEFT directory as multipart/form-data, or JSON that says where they are.

    It answers requests when this call returns. What is refused leaves nothing behind.
    """
    api = api_of(request)
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await _json_body(request)
        name = AdapterName(admin.acting_for(body.tenant), body.name)
        alias = body.alias
        manifest = await api.publish(lambda: api.admin.register(name, body.source, alias))
    else:
        with api.uploads.place() as receiver:
            upload = await receiver.receive(request)
            fields = upload.fields
            if "name" not in fields:
                raise InvalidRequestError("the field name is missing", param="name")
            name = AdapterName(admin.acting_for(fields.get("tenant")), fields["name"])
            alias = fields.get("alias", DEFAULT_ALIAS)
            manifest = await api.publish(
                lambda: api.admin.publish(name, upload.read(), alias, source="upload")
            )
    return JSONResponse(published_view(name, manifest, alias, api.base_id), status_code=201)


@router.delete("/{name}", responses=examples.DELETED)
async def delete_adapter(
    request: Request, admin: Admin, name: str, tenant: Tenant = None
) -> dict[str, Any]:
    """Delete an adapter with its versions and aliases. Files go with garbage collection."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    await _change(api, lambda: api.admin.delete(adapter))
    return {"id": name, "object": "adapter", "deleted": True}


@router.delete("/{name}/versions/{version}", responses=examples.DELETED_VERSION)
async def delete_version(
    request: Request, admin: Admin, name: str, version: str, tenant: Tenant = None
) -> dict[str, Any]:
    """Delete one version that no alias means."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    gone = await _change(api, lambda: api.admin.delete_version(adapter, version))
    return {"id": name, "object": "adapter.version", "version": gone, "deleted": True}


@router.put("/{name}/aliases/{alias}", responses=examples.ALIAS)
async def move_alias(
    request: Request,
    admin: Admin,
    name: str,
    alias: str,
    body: AliasRequest,
    tenant: Tenant = None,
) -> dict[str, Any]:
    """Let an alias mean a version, old or new; it serves it once the version is warm."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    return _alias_view(
        adapter,
        alias,
        await _change(api, lambda: api.admin.move_alias(adapter, alias, body.version)),
    )


@router.post("/{name}/aliases/{alias}/rollback", responses=examples.ALIAS)
async def roll_back(
    request: Request, admin: Admin, name: str, alias: str, tenant: Tenant = None
) -> dict[str, Any]:
    """Let an alias mean again what it meant before."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    return _alias_view(
        adapter, alias, await _change(api, lambda: api.admin.roll_back(adapter, alias))
    )


@router.put("/{name}/pin", responses=examples.PIN)
async def pin(
    request: Request, admin: Admin, name: str, body: PinRequest, tenant: Tenant = None
) -> dict[str, Any]:
    """Keep an adapter on so many replicas at least, whether or not anybody asks for it."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    await _change(api, lambda: api.admin.pin(adapter, body.copies))
    return {"id": name, "object": "adapter.pin", "copies": body.copies}


@router.delete("/{name}/pin", responses=examples.PIN)
async def unpin(request: Request, admin: Admin, name: str, tenant: Tenant = None) -> dict[str, Any]:
    """Take a pin away; no error when there is none."""
    api = api_of(request)
    adapter = AdapterName(admin.acting_for(tenant), name)
    await _change(api, lambda: api.admin.unpin(adapter))
    return {"id": name, "object": "adapter.pin", "copies": 0}


async def _change(api: Api, change: Callable[[], Result]) -> Result:
    result = await asyncio.to_thread(change)
    api.names.forget()
    return result


async def _state(api: Api) -> ClusterState:
    """What the placement manager knows; the table alone while it does not answer."""
    try:
        return await api.cluster_state()
    except OverloadedError:
        return ClusterState(api.view.table)


async def _json_body(request: Request) -> RegisterRequest:
    """As FastAPI reads the bodies of other routes, with the same answer to what is wrong."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise InvalidRequestError("the request body is not valid JSON") from None
    try:
        return RegisterRequest.model_validate(body)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors, body=body) from None


def _alias_view(name: AdapterName, alias: str, record: AliasRecord) -> dict[str, Any]:
    return {
        "id": name.name,
        "object": "adapter.alias",
        "alias": alias,
        "version": record.version,
        "generation": record.generation,
    }
