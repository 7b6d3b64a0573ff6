"""Every error of ours has its status and OpenAI's shape; nothing else of the inside ever gets out."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import httpx
import pytest

from cluster.keys import KeyRing, new_key
from cluster.published import Published
from cluster.state import ClusterState
from cluster.view import TableView
from deployments import errors as door_errors
from deployments.api import Api
from deployments.callers import Doorkeeper
from deployments.errors import http_error
from deployments.http_app import create_http_app
from deployments.last_good import LastGood
from deployments.metrics.exposition import Metrics
from deployments.model_list import ModelList
from storage import errors
from storage.errors import FloraError, OverloadedError, StoreUnavailableError, TooManyJobsError
from tests.cluster.clocks import ManualClock
from training.service.job_figures import JobFigures

STATUS = {
    "InvalidRequestError": 400,
    "UnsupportedFieldError": 400,
    "ContextLengthError": 400,
    "AmbiguousModelError": 400,
    "SpecificationError": 400,
    "UnknownModelError": 404,
    "BaseMismatchError": 409,
    "AdapterRefusedError": 422,
    "CapacityError": 422,
    "AdapterCorruptError": 503,
    "StoreUnavailableError": 503,
    "OverloadedError": 503,
    "NoKeyError": 401,
    "WrongKeyError": 401,
    "AdminOnlyError": 403,
    "ForbiddenSourceError": 403,
    "AliasTakenError": 409,
    "QuotaExceededError": 429,
    "TooManyJobsError": 429,
    "NoAdapterError": 404,
    "NotFoundError": 404,
    "JobEndedError": 400,
    "NameTakenError": 409,
    "AlreadyLoadedError": 400,
    "BodyTooLargeError": 413,
    "EngineLostError": 503,
    "ReplicaLostError": 503,
    "RequestTimeoutError": 503,
    "WrongAdapterError": 500,
    "FloraError": 500,
}


def kinds() -> list[type[FloraError]]:
    found = {
        kind
        for module in (errors, door_errors)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, FloraError)
    }
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_each_error_has_its_status_and_one_shape(kind: type[FloraError]) -> None:
    answer = http_error(kind("what happened", param="model"))
    assert answer.status == STATUS[kind.__name__]
    error = answer.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if not issubclass(kind, StoreUnavailableError):
        assert error["message"] == "what happened"
    assert error["param"] == "model"
    assert error["code"] == kind.code and isinstance(error["type"], str)
    passes = answer.status == 503 or kind is TooManyJobsError
    assert ("Retry-After" in answer.headers) == passes
    assert ("WWW-Authenticate" in answer.headers) == (answer.status == 401)


def reading(value: Any) -> LastGood[Any]:
    return LastGood(lambda: value, 1.0, "constant")


def test_a_registry_that_is_away_is_told_without_naming_its_host() -> None:
    secret = "could not connect to http://10.0.0.7:9000/bucket/blobs/sha256/12"
    answer = http_error(StoreUnavailableError(secret))
    message = answer.body["error"]["message"]
    assert "registry cannot be reached" in message and "10.0.0.7" not in message


def app_parts(**parts: Any) -> Api:
    """An API whose parts are used only where a test gives them."""
    nothing: Any = None
    api = Api(
        base_id="base",
        created_s=1,
        request_timeout_s=1.0,
        replica_range=(1, 1),
        doorkeeper=Doorkeeper(reading(KeyRing()), allows_anonymous=True),
        gateway=nothing,
        codec=nothing,
        names=nothing,
        view=TableView(ManualClock()),
        models=reading(ModelList(Published())),
        admin=nothing,
        uploads=nothing,
        training=nothing,
        cluster_state=nothing,
        metrics=Metrics(TableView(ManualClock())),
    )
    return replace(api, **parts)


def get(api: Api, path: str, client: str = "127.0.0.1", **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_http_app(api), client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path, headers=headers)

    return asyncio.run(ask())


def crash() -> NoReturn:
    raise RuntimeError("secret: /home/someone/key")


def test_a_crash_tells_nothing_of_our_inside() -> None:
    response = get(app_parts(models=LastGood(crash, 1.0, "broken")), "/v1/models")
    assert response.status_code == 500
    assert "secret" not in response.text and "Traceback" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("client", ["10.0.0.7", "192.168.1.2", "2001:db8::1"])
def test_without_keys_another_machine_is_turned_away_whatever_address_is_bound(client: str) -> None:
    response = get(app_parts(), "/v1/models", client=client)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "authentication_required"


async def no_manager() -> ClusterState:
    raise OverloadedError("no manager")


def test_metrics_are_for_admins() -> None:
    user, admin = (new_key("acme", is_admin=is_admin, created_s=0.0) for is_admin in (False, True))
    keys = reading(KeyRing([user.key, admin.key]))
    api = app_parts(
        doorkeeper=Doorkeeper(keys, allows_anonymous=False),
        training=SimpleNamespace(figures=JobFigures().read),
        cluster_state=no_manager,
    )
    assert get(api, "/metrics").status_code == 401
    answers = {
        key.key.is_admin: get(api, "/metrics", authorization=f"Bearer {key.token}")
        for key in (user, admin)
    }
    assert answers[False].status_code == 403
    assert (
        answers[True].status_code == 200 and "flora_placement_manager_up 0.0" in answers[True].text
    )


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_is_let_in(client: str) -> None:
    assert get(app_parts(), "/v1/models", client=client).status_code == 200


def test_a_request_id_unfit_for_a_header_is_replaced() -> None:
    response = get(app_parts(), "/version", **{"x-request-id": "a" * 500})
    assert len(response.headers["x-request-id"]) < 100
