"""Managers and replicas collect cycles without looking at all that lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from storage.collecting import LOADS_TOGETHER, THAW_S, Collecting
from tests.cluster.clocks import ManualClock


class Node:
    """One that only the collector can end, once it is in a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _process_is_left_as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_lives_is_looked_at_once_and_then_no_more() -> None:
    collecting = Collecting(ManualClock())
    node = Node()
    assert any(each is node for each in gc.get_objects())
    collecting.settle()
    assert not any(each is node for each in gc.get_objects())


def test_a_cycle_that_ends_while_it_is_young_is_collected_at_once() -> None:
    collecting = Collecting(ManualClock())
    ended = weakref.ref(Node())
    collecting.settle()
    assert ended() is None


def test_a_cycle_that_ends_later_is_collected_when_all_are_looked_at_again() -> None:
    clock = ManualClock()
    collecting = Collecting(clock)
    node = Node()
    collecting.settle()
    ended = weakref.ref(node)
    del node
    collecting.settle()
    assert ended() is not None
    clock.advance(THAW_S)
    collecting.settle()
    assert ended() is None


def test_it_settles_each_time_enough_was_loaded() -> None:
    collecting = Collecting(ManualClock())

    def is_set_aside(num_loads: int) -> bool:
        node = Node()
        collecting.settle_if_due(num_loads)
        return not any(each is node for each in gc.get_objects())

    enough = LOADS_TOGETHER
    seen = [0, enough - 1, enough, enough + 1, 2 * enough - 1, 2 * enough + 5, 3 * enough + 4]
    assert [is_set_aside(num_loads) for num_loads in seen] == [
        *(False, False, True),
        *(False, False, True, False),
    ]
