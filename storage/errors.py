"""The errors a user of this system can meet. Each carries what the user must know.

HTTP status and exit code are mapped in one place each (`deployments/errors.py`, `cli/errors.py`), by class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from storage.identity import AdapterVersion


class FloraError(Exception):
    """Base of all our errors.

    Args:
        message: one or two sentences a user can act on; never a stack trace, never a file path of the server.
        param: the request or specification field the error is about, dotted (`adapters.2.rank`), if there is one.
    """

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.param)


def _rebuild(kind: type[FloraError], message: str, param: str | None) -> FloraError:
    return kind(message, param=param)


class InvalidRequestError(FloraError):
    """A field has a value that is not allowed."""

    code = "invalid_value"


class UnsupportedFieldError(InvalidRequestError):
    """A field that exists in the API's vocabulary but is not supported here; never ignored silently."""

    code = "unsupported_field"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class AmbiguousModelError(InvalidRequestError):
    """A model name that could mean two things."""

    code = "model_ambiguous"


class UnknownModelError(FloraError):
    """No such base model, adapter, alias or version. Also told for another tenant's private adapter."""

    code = "model_not_found"


class NotFoundError(FloraError):
    """There is no such file or training job. Also told for another tenant's."""

    code = "not_found"


class AdapterRefusedError(FloraError):
    """An adapter's files break a rule: says which tensor or setting, and why."""

    code = "adapter_refused"


class AliasTakenError(AdapterRefusedError):
    """A version was not to take another one's place, and there is one. It is published, and no alias means it."""

    code = "alias_taken"


class NoAdapterError(AdapterRefusedError):
    """There is no adapter at the place one is to be read from."""

    code = "adapter_not_found"


class BaseMismatchError(FloraError):
    """The adapter was made for another base model than the one served."""

    code = "base_mismatch"


class AdapterCorruptError(FloraError):
    """Stored bytes do not have the digest they are filed under. Never served."""

    code = "adapter_corrupt"


class CapacityError(FloraError):
    """The request can never fit the replica's bank or cache, whatever is evicted."""

    code = "capacity_exceeded"


class QuotaExceededError(FloraError):
    """The tenant has as much as it may have. Says how much that is, and what makes room."""

    code = "quota_exceeded"


class TooManyJobsError(QuotaExceededError):
    """The tenant has as many jobs as it may have at once; there is room when one of them ends."""

    code = "too_many_jobs"
    retry_after_s: ClassVar[int] = 30


class OverloadedError(FloraError):
    """No replica can take the request now; worth retrying after `retry_after_s` seconds."""

    code = "overloaded"
    retry_after_s: ClassVar[int] = 1


class EngineLostError(OverloadedError):
    """The engine that had the request, or should have taken it, is gone. Another one may answer."""

    code = "engine_lost"


class StoreUnavailableError(FloraError):
    """The object store cannot be reached, or does not keep the promises the registry needs."""

    code = "registry_unavailable"


class SpecificationError(InvalidRequestError):
    """A training specification or data file is wrong: names the field, or the file and line."""

    code = "invalid_specification"


@dataclass(frozen=True, slots=True)
class FailedVersion:
    """A version that exists and cannot be loaded. `code` and `message` are the error's."""

    version: AdapterVersion
    code: str
    message: str
