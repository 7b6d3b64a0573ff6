"""Errors at the door: which HTTP status each of our errors is, and the one shape their bodies have (OpenAI's)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from storage.errors import (
    AdapterCorruptError,
    AdapterRefusedError,
    AliasTakenError,
    BaseMismatchError,
    CapacityError,
    EngineLostError,
    FloraError,
    InvalidRequestError,
    NoAdapterError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    StoreUnavailableError,
    TooManyJobsError,
    UnknownModelError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_REGISTRY_AWAY = (
    "the adapter registry cannot be reached; adapters that replicas hold are served all the same, others "
    "as soon as it is back"
)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class WrongAdapterError(FloraError):
    """A replica answered with other adapters than were asked for. Nothing of such an answer is ever passed on."""

    code = "wrong_adapter"


class NoKeyError(FloraError):
    """The request needs an API key and has none."""

    code = "authentication_required"


class WrongKeyError(FloraError):
    """The request's API key is unknown or revoked."""

    code = "invalid_api_key"


class AdminOnlyError(FloraError):
    """A user's key was used for what only an admin's may do."""

    code = "admin_key_required"


class ForbiddenSourceError(FloraError):
    """An adapter is to be read from a place that the settings do not allow."""

    code = "source_not_allowed"


class AlreadyLoadedError(InvalidRequestError):
    """An adapter of that name is loaded, and was not to be replaced."""

    code = "adapter_already_loaded"


class JobEndedError(InvalidRequestError):
    """A training job has ended, and can no longer be changed."""

    code = "job_ended"


class BodyTooLargeError(InvalidRequestError):
    """The request's body is longer than what is accepted."""

    code = "body_too_large"


class NameTakenError(FloraError):
    """The name is used by something else already."""

    code = "name_taken"


class RequestTimeoutError(OverloadedError):
    """The request was not finished by its deadline."""

    code = "request_timeout"


class ReplicaLostError(EngineLostError):
    """The replica that was answering is gone. Another one may answer, if the client has seen nothing yet."""

    code = "replica_lost"


_STATUS: tuple[tuple[type[FloraError], int], ...] = (
    (NoKeyError, 401),
    (WrongKeyError, 401),
    (AdminOnlyError, 403),
    (ForbiddenSourceError, 403),
    (BodyTooLargeError, 413),
    (NoAdapterError, 404),
    (NameTakenError, 409),
    (InvalidRequestError, 400),
    (UnknownModelError, 404),
    (NotFoundError, 404),
    (BaseMismatchError, 409),
    (AliasTakenError, 409),
    (AdapterRefusedError, 422),
    (CapacityError, 422),
    (QuotaExceededError, 429),
    (AdapterCorruptError, 503),
    (StoreUnavailableError, 503),
    (OverloadedError, 503),
)
"""The first class that fits decides."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """What to answer. `body` is JSON; no stack trace and no message of a foreign library is ever in it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def http_error(error: Exception) -> HttpError:
    """The answer to a request that ended with `error`."""
    if not isinstance(error, FloraError):
        return plain_error(500, "the server failed; its log says more", code="internal_error")
    status = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        headers["Retry-After"] = str(OverloadedError.retry_after_s)
    if isinstance(error, TooManyJobsError):
        headers["Retry-After"] = str(error.retry_after_s)
    message = error.message
    if isinstance(error, StoreUnavailableError):
        # Its own names buckets and hosts; the operator reads that in the log and at /v1/cluster.
        message = _REGISTRY_AWAY
    return plain_error(status, message, error.param, error.code, headers)


def plain_error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> HttpError:
    """An answer for what has no error class of ours, such as an unknown path."""
    error = {
        "message": message,
        "type": _TYPES.get(status, "server_error"),
        "param": param,
        "code": code or _CODES.get(status, "internal_error"),
    }
    return HttpError(status, {"error": error}, headers or {})
