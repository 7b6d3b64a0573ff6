"""Failures are remembered as long as they mean something, and no more of them than there is room for."""

from __future__ import annotations

from storage.errors import AdapterRefusedError
from tests.workers.engine.small_engine import version
from workers.bank.load_failures import MAX_FAILED, RETRY_AFTER_S, LoadFailures
from workers.bank.load_queue import Urgency


def test_the_latest_failed_versions_are_kept() -> None:
    failures = LoadFailures()
    for number in (*range(MAX_FAILED), 0, MAX_FAILED):
        failures.failed_now(version(number), AdapterRefusedError("too long"), now=float(number))
    kept = {one.version for one in failures.failed(now=0.0)}
    assert kept == {version(number) for number in range(MAX_FAILED + 1)} - {version(1)}


def test_what_is_tried_again_rests_no_more() -> None:
    failures = LoadFailures()
    failures.no_room(version(1), now=0.0)
    assert failures.is_resting(version(1), Urgency.WANTED, now=RETRY_AFTER_S - 0.1)
    assert failures.error(version(1), now=0.0) is None, "no room is no error of the version"
    assert not failures.is_resting(version(1), Urgency.WANTED, now=RETRY_AFTER_S)
    failures.failed_now(version(1), AdapterRefusedError("too long"), now=0.0)
    failures.loaded(version(1))
    assert not failures.is_resting(version(1), Urgency.KEPT, now=0.0)
    assert failures.error(version(1), now=0.0) is None and not failures.failed(now=0.0)
