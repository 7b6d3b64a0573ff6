"""A reader that follows the changes of a mapping always has the mapping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.changes import ChangeLog, Changes

steps = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 8), st.integers(0, 3)), st.booleans()), max_size=30
)


@given(steps)
def test_a_reader_that_asks_now_and_then_has_what_there_is(steps) -> None:
    log: ChangeLog[int, int] = ChangeLog()
    known, known_stamp = {}, 0
    for stamp, (fresh, is_asked) in enumerate(steps, start=1):
        log.replace(fresh, stamp)
        if is_asked:
            known, known_stamp = log.since(known_stamp).applied_to(known), stamp
            assert known == fresh


def test_only_what_changed_is_sent_and_nothing_when_nothing_did() -> None:
    log: ChangeLog[str, int] = ChangeLog()
    log.replace({"a": 1, "b": 2, "c": 3}, 1)
    assert not log.replace({"a": 1, "b": 2, "c": 3}, 2)
    assert log.since(1) == Changes()
    assert log.replace({"a": 1, "b": 5}, 3)
    assert log.since(2) == Changes({"b": 5}, ("c",))
    known = {"a": 1}
    assert log.since(3).applied_to(known) is known


def test_what_is_gone_is_not_remembered_for_ever_and_late_readers_get_the_whole() -> None:
    log: ChangeLog[int, int] = ChangeLog()
    log.put(-1, 0, 1)
    for stamp in range(2, 5000):
        log.put(stamp, 0, stamp)
        log.drop(stamp, stamp)
    assert log.since(2) == Changes({-1: 0}, is_whole=True)
    assert not log.since(4999).is_whole


def test_the_same_mapping_again_is_no_change_unless_something_else_was_in_between() -> None:
    log: ChangeLog[str, int] = ChangeLog()
    fresh = {"a": 1, "b": 2}
    assert log.replace(fresh, 1)
    assert not log.replace(fresh, 2)
    log.drop("a", 3)
    assert log.replace(fresh, 4)
    assert log.since(3) == Changes({"a": 1})
