"""What was read once is at hand at once, and a reading is shared, not repeated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from deployments.last_good import LastGood
from storage.errors import StoreUnavailableError
from tests.cluster.clocks import ManualClock


class Source:
    """Counts its readings; may be held up, or fail."""

    def __init__(self) -> None:
        self.count = 0
        self.is_away = False
        self.may_answer = threading.Event()
        self.may_answer.set()

    def read(self) -> int:
        self.count += 1
        number = self.count
        assert self.may_answer.wait(10)
        if self.is_away:
            raise StoreUnavailableError("away")
        return number


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never became true")


def test_a_copy_at_hand_is_never_waited_for() -> None:
    source = Source()
    last = LastGood(source.read, 0.01, "test")
    assert last.last is None
    assert asyncio.run(last.now()) == 1
    source.may_answer.clear()
    last.follow()
    until(lambda: source.count == 2)
    assert asyncio.run(last.now()) == 1  # while the second reading hangs
    source.may_answer.set()
    until(lambda: (last.last or 0) >= 2)
    last.stop()


def test_who_waits_for_a_fresh_reading_shares_it_and_never_gets_one_that_began_before() -> None:
    source = Source()
    last = LastGood(source.read, 60.0, "test")
    source.may_answer.clear()
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(last.refresh())) for _ in range(8)]
    threads[0].start()
    until(lambda: source.count == 1)
    for thread in threads[1:]:
        thread.start()
    threading.Event().wait(0.1)  # until they wait their turn
    source.may_answer.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [1, 2, 2, 2, 2, 2, 2, 2]


def test_what_was_read_last_stands_while_the_source_is_away() -> None:
    source = Source()
    last = LastGood(source.read, 60.0, "test")
    source.is_away = True
    with pytest.raises(StoreUnavailableError):
        asyncio.run(last.now())
    source.is_away = False
    assert asyncio.run(last.now()) == 2
    source.is_away = True
    with pytest.raises(StoreUnavailableError):
        asyncio.run(last.fresh())
    assert asyncio.run(last.now()) == 2


def test_a_recent_reading_is_not_repeated() -> None:
    clock, source = ManualClock(), Source()
    last = LastGood(source.read, 60.0, "test", clock)
    assert asyncio.run(last.recent(1.0)) == 1
    clock.advance(0.5)
    assert asyncio.run(last.recent(1.0)) == 1
    clock.advance(1.0)
    assert asyncio.run(last.recent(1.0)) == 2


def test_following_outlives_whatever_a_reading_raises() -> None:
    source = Source()

    def read() -> int:
        number = source.read()
        if number < 4:
            raise RuntimeError("broken")
        return number

    last = LastGood(read, 0.01, "test")
    last.follow()
    until(lambda: last.last is not None)
    last.stop()
