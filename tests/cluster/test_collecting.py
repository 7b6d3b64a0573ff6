"""Managers and replicas collect cycles without looking at all that lives."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from cluster.collecting import THAW_S, Collecting
from tests.cluster.clocks import ManualClock


class Node:
    """One that only the collector can end, once it is in a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _process_is_left_as_it_was() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    yield
    gc.unfreeze()
    sys.setswitchinterval(interval_s)


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


def test_it_settles_each_time_enough_was_made() -> None:
    collecting = Collecting(ManualClock())

    def is_set_aside(num_made: int) -> bool:
        node = Node()
        collecting.settle_if_due(num_made, 10)
        return not any(each is node for each in gc.get_objects())

    assert [is_set_aside(made) for made in (0, 9, 10, 11, 19, 25, 34, 35)] == [
        *(False, False, True),
        *(False, False, True),
        *(False, True),
    ]
