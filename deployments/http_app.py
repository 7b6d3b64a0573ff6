"""The HTTP application: routes, request ids, and every error in one shape."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import (
    adapters_api,
    cluster_api,
    files_api,
    fine_tuning_api,
    generation_api,
    lora_api,
    metrics_api,
    models_api,
    service_api,
)
from deployments.api import Api, new_request_id
from deployments.callers import Doorkeeper
from deployments.errors import HttpError, http_error, plain_error
from deployments.metrics.requests import MeasuredApp, MeasuredGateway
from deployments.version import VERSION
from storage.errors import FloraError, InvalidRequestError, UnsupportedFieldError

_MAX_REQUEST_ID = 128
_OPEN_TO_ALL = frozenset({"/health", "/version", "/docs", "/openapi.json"})
"""What tells nothing of anybody: probes of a load balancer have no key."""
_MAX_BODY_BYTES = 4 << 20
"""Of a request that is read into memory: 2^19 tokens as six digits, a comma and a space; or four million letters.

It is parsed and validated in the event loop. Uploads have bounds of their own.
"""

_log = logging.getLogger(__name__)


def create_http_app(api: Api, *, is_behind_serve: bool = False) -> FastAPI:
    """The application over the parts in `api`. Needs no Ray.

    Args:
        is_behind_serve: Ray Serve's HTTP server puts `x-request-id` on requests and responses itself.
    """
    app = FastAPI(
        title="FLoRA Cluster",
        version=VERSION,
        # For /docs, which then asks for a key; who may come in is decided at the door.
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    app.state.api = replace(api, gateway=MeasuredGateway(api.gateway, api.metrics.requests))
    for module in (
        generation_api,
        models_api,
        adapters_api,
        files_api,
        fine_tuning_api,
        lora_api,
        cluster_api,
        service_api,
        metrics_api,
    ):
        app.include_router(module.router)
    app.add_exception_handler(FloraError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_middleware(_Door, keeper=api.doorkeeper, stamps_responses=not is_behind_serve)
    app.add_middleware(MeasuredApp, metrics=api.metrics.requests)
    return app


def respond(error: HttpError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    return respond(http_error(error))


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that does not validate: the innermost thing wrong, for a union complains of every alternative."""
    assert isinstance(error, RequestValidationError)
    field, worst = max(
        ((_field(each, error.body), each) for each in error.errors()),
        key=lambda found: len(found[0]),
    )
    param = ".".join(field) or None
    message = f"{param or 'the request body'}: {worst['msg']}"
    answer: FloraError = InvalidRequestError(message, param=param)
    if worst["type"] == "json_invalid":
        answer = InvalidRequestError("the request body is not valid JSON")
    elif worst["type"] == "extra_forbidden":
        answer = UnsupportedFieldError(f"there is no field {param}", param=param)
    return respond(http_error(answer))


def _field(error: Mapping[str, Any], body: Any) -> list[str]:
    """Where in the body an error is. What else is in pydantic's location names alternatives of a union."""
    field = []
    _, *location = error["loc"]  # it begins with "body"
    for part in location:
        in_mapping = isinstance(body, dict) and part in body
        in_list = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if in_mapping or in_list:
            field.append(str(part))
            body = body[part]
        elif error["type"] == "missing" and part == location[-1]:
            field.append(str(part))
    return field


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    return respond(plain_error(error.status_code, f"{place}: {error.detail}", headers=headers))


class _Door:
    """Around everything: who may come in, a request id for each response, and nothing of our inside on a crash."""

    def __init__(self, app: ASGIApp, keeper: Doorkeeper, stamps_responses: bool) -> None:
        self._app = app
        self._keeper = keeper
        self._stamps_responses = stamps_responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        has_started = False

        async def send_stamped(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._stamps_responses:
                    stamp = (b"x-request-id", request_id.encode("latin-1"))
                    message["headers"] = [*message.get("headers", []), stamp]
            await send(message)

        try:
            if scope["path"] not in _OPEN_TO_ALL:
                scope["caller"] = await self._keeper.identify(
                    _header(scope, b"authorization"), is_local=_is_local(scope)
                )
            await self._app(scope, _bounded(receive, scope), send_stamped)
        except Exception as error:
            if not isinstance(error, FloraError):
                _log.exception("request %s failed", request_id)
            if has_started:
                raise
            await respond(http_error(error))(scope, receive, send_stamped)


def _bounded(receive: Receive, scope: Scope) -> Receive:
    """The request's body, up to where it is too much."""
    is_form = (_header(scope, b"content-type") or "").startswith("multipart/form-data")
    if is_form and scope["path"] in (adapters_api.UPLOAD_PATH, files_api.FILES_PATH):
        return receive
    num_bytes = 0

    async def receive_bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {_MAX_BODY_BYTES:,} bytes")
        return message

    return receive_bounded


def _request_id(scope: Scope) -> str:
    """The client's own, if it is fit to be repeated in a header; else a new one."""
    text = _header(scope, b"x-request-id") or ""
    is_fit = 0 < len(text) <= _MAX_REQUEST_ID and text.isascii() and text.isprintable()
    return text if is_fit else new_request_id()


def _header(scope: Scope, wanted: bytes) -> str | None:
    found = (value for name, value in scope["headers"] if name == wanted)
    value: bytes | None = next(found, None)
    return None if value is None else value.decode("latin-1")


def _is_local(scope: Scope) -> bool:
    client: Any = scope.get("client")
    if not client:  # a socket of this machine's own
        return True
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
