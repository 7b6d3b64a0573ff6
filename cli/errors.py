"""Exit codes, in one place: 0 done, 1 it could not be done, 2 it was asked for wrongly."""

from __future__ import annotations

from storage.errors import (
    AdapterRefusedError,
    FloraError,
    InvalidRequestError,
    NotFoundError,
    UnknownModelError,
)

EXIT_FAILED = 1
EXIT_USAGE = 2


class CommandFailedError(FloraError):
    """A command's own work failed on this machine: a download, a process, a check. Says what to do about it."""

    code = "command_failed"


def exit_code(error: BaseException) -> int:
    """What the shell is told. What the user can put right by asking differently is 2; Ctrl-C is a failure."""
    if isinstance(
        error, InvalidRequestError | NotFoundError | UnknownModelError | AdapterRefusedError
    ):
        return EXIT_USAGE
    return EXIT_FAILED
