"""What became of loads that failed: who is to be told, what is not tried again yet, and which versions are no good."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from storage.errors import (
    AdapterCorruptError,
    AdapterRefusedError,
    BaseMismatchError,
    CapacityError,
    FailedVersion,
    StoreUnavailableError,
    UnknownModelError,
)
from storage.identity import AdapterVersion
from workers.bank.load_queue import Urgency

RETRY_AFTER_S = 5.0
"""How long a failed load answers further requests, and is not tried again."""

PASSING_RETRY_AFTER_S = 1.0
"""The same where the next try may well succeed: the registry was away, or the version not published yet."""

REPAIR_AFTER_S = 15.0
"""How long a damaged version counts as failed: publishing it again repairs it."""

FETCH_AGAIN_AFTER_S = 30.0
"""How long what was fetched only to be near is not fetched again: perhaps there is no room to keep it."""

MAX_FAILED = 256
"""Failed versions that are remembered, the latest."""

_PASSING = (StoreUnavailableError, UnknownModelError)
_NO_GOOD = (AdapterCorruptError, AdapterRefusedError, BaseMismatchError, CapacityError)


@dataclass(frozen=True, slots=True)
class _Rest:
    """A version that no wish of at most this urgency brings back before `until_s`."""

    until_s: float
    error: Exception | None  # what requests are answered with meanwhile
    urgency: Urgency = Urgency.WANTED


class LoadFailures:
    """Not thread-safe. Times are seconds on one clock."""

    def __init__(self) -> None:
        self.num_errors = 0
        self._resting: dict[AdapterVersion, _Rest] = {}
        self._untold: dict[AdapterVersion, Exception] = {}
        self._failed: OrderedDict[AdapterVersion, tuple[float, FailedVersion]] = OrderedDict()

    def failed_now(self, version: AdapterVersion, error: Exception, now: float) -> None:
        """A load ended with an error."""
        self.num_errors += 1
        retry_s = PASSING_RETRY_AFTER_S if isinstance(error, _PASSING) else RETRY_AFTER_S
        self._rest(version, _Rest(now + retry_s, error), now)
        self._untold[version] = error
        if isinstance(error, _NO_GOOD):
            until_s = float("inf")
            if isinstance(error, AdapterCorruptError):
                until_s = now + REPAIR_AFTER_S
            self._failed[version] = until_s, FailedVersion(version, error.code, error.message)
            self._failed.move_to_end(version)
            if len(self._failed) > MAX_FAILED:
                self._failed.popitem(last=False)

    def no_room(self, version: AdapterVersion, now: float) -> None:
        """Nobody waits for it, and the bank is full."""
        self._rest(version, _Rest(now + RETRY_AFTER_S, None), now)

    def loaded(self, version: AdapterVersion) -> None:
        """It came after all."""
        self._resting.pop(version, None)
        self._failed.pop(version, None)

    def fetched(self, version: AdapterVersion, now: float) -> None:
        """It was only to be near, and is, if there was room."""
        self._rest(version, _Rest(now + FETCH_AGAIN_AFTER_S, None, Urgency.KEPT), now)

    def take_untold(self) -> dict[AdapterVersion, Exception]:
        """What failed since the last call: whoever waits for these should be told."""
        untold, self._untold = self._untold, {}
        return untold

    def is_resting(self, version: AdapterVersion, urgency: Urgency, now: float) -> bool:
        """It is too early for another try that no request asks for."""
        rest = self._resting.get(version)
        return rest is not None and now < rest.until_s and urgency >= rest.urgency

    def error(self, version: AdapterVersion, now: float) -> Exception | None:
        """What a request is answered with instead of another try."""
        rest = self._resting.get(version)
        return rest.error if rest is not None and now < rest.until_s else None

    def failed(self, now: float) -> tuple[FailedVersion, ...]:
        """Versions that exist and cannot be served here, as far as is known."""
        return tuple(one for until_s, one in self._failed.values() if now < until_s)

    def _rest(self, version: AdapterVersion, rest: _Rest, now: float) -> None:
        over = [one for one, other in self._resting.items() if other.until_s <= now]
        for one in over:
            del self._resting[one]
        self._resting[version] = rest
