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

    async def ask() -> None:
        results.append(await last.fresh())

    async def ask_all() -> None:
        first = asyncio.create_task(ask())
        while not source.count:
            await asyncio.sleep(0.005)
        others = [asyncio.create_task(ask()) for _ in range(7)]
        await asyncio.sleep(0)  # now all of them have asked
        source.may_answer.set()
        await asyncio.gather(first, *others)

    asyncio.run(ask_all())
    assert sorted(results) == [1, 2, 2, 2, 2, 2, 2, 2]


def test_who_waits_together_shares_a_failure_and_holds_no_thread_that_others_need() -> None:
    source = Source()
    last = LastGood(source.read, 60.0, "test")
    source.is_away = True
    source.may_answer.clear()

    async def ask_all() -> list[int | BaseException]:
        first = asyncio.create_task(last.fresh())
        while not source.count:
            await asyncio.sleep(0.005)
        others = [asyncio.create_task(last.fresh()) for _ in range(64)]
        # More than the loop's own threads are.
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 10) == 7
        source.may_answer.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    results = asyncio.run(ask_all())
    assert len(results) == 65
    assert all(isinstance(each, StoreUnavailableError) for each in results)
    assert source.count == 2


def test_a_slow_failure_is_recent_from_its_end() -> None:
    clock, source = ManualClock(), Source()

    def read() -> int:
        number = source.read()
        if number == 2:
            clock.advance(5.0)
            raise StoreUnavailableError("away")
        return number

    last = LastGood(read, 60.0, "test", clock)
    assert asyncio.run(last.now()) == 1
    clock.advance(2.0)
    with pytest.raises(StoreUnavailableError):
        asyncio.run(last.recent(1.0))
    assert asyncio.run(last.recent(1.0)) == 1
    clock.advance(1.5)
    assert asyncio.run(last.recent(1.0)) == 3


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
