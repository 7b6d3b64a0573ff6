"""Whose new work waits when the bank is full and somebody waits too long."""

from __future__ import annotations

from storage.identity import AdapterVersion
from workers.engine.starvation import StarvationRule

A, B, C, COLD = (AdapterVersion(letter * 64) for letter in "abcf")


def update(
    rule: StarvationRule, work_left: dict[AdapterVersion, float], **changes: object
) -> set[str]:
    arguments = {"starving": [COLD], "is_trying": False, "pinned": (), "work_left": work_left}
    rule.update(**{**arguments, **changes})  # type: ignore[arg-type]
    return set(rule.closed)


def test_nobody_is_closed_while_nobody_starves() -> None:
    assert update(StarvationRule(), {A: 5.0}, starving=[]) == set()


def test_the_adapter_with_the_least_work_left_is_closed_until_it_is_idle_and_then_the_next() -> (
    None
):
    rule = StarvationRule()
    assert update(rule, {A: 5.0, B: 2.0, C: 9.0}) == {B}
    assert update(rule, {A: 1.0, B: 1.0, C: 9.0}) == {B}
    # B is idle and its rows are not enough; it stays closed, or it would fill up again.
    assert update(rule, {A: 1.0, B: 0.0, C: 9.0}) == {A, B}


def test_no_more_are_closed_while_a_load_is_being_tried() -> None:
    rule = StarvationRule()
    update(rule, {A: 5.0, B: 2.0})
    assert update(rule, {A: 5.0, B: 0.0}, is_trying=True) == {B}


def test_all_open_again_once_nobody_starves() -> None:
    rule = StarvationRule()
    update(rule, {A: 5.0, B: 2.0})
    assert update(rule, {A: 5.0}, starving=[]) == set()


def test_pinned_adapters_are_closed_last_even_when_idle() -> None:
    rule = StarvationRule()
    assert update(rule, {A: 0.0, B: 9.0}, pinned={A}) == {B}
    assert update(rule, {A: 0.0, B: 0.0}, pinned={A}) == {A, B}


def test_there_may_be_nobody_left_to_close() -> None:
    rule = StarvationRule()
    update(rule, {A: 0.0})
    assert update(rule, {A: 0.0}) == {A}
