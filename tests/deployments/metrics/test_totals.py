"""Counts of many replicas as one that only grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.metrics.totals import Totals
from storage.figures import FigureBook, Figures

KEY = ("tokens", ())


def tokens(count: float) -> Figures:
    return Figures(counters={KEY: count})


def total(totals: Totals) -> float:
    return totals.read().counters[KEY]


def test_a_replica_that_leaves_takes_nothing_with_it() -> None:
    totals = Totals()
    totals.take({"a": tokens(10), "b": tokens(5)})
    totals.take({"b": tokens(7)})
    assert total(totals) == 17


def test_a_replica_in_place_of_another_begins_at_zero_and_the_total_does_not() -> None:
    totals = Totals()
    totals.take({"a": tokens(10)})
    totals.take({"b": tokens(1)})
    assert total(totals) == 11


def test_an_engine_that_counts_anew_under_the_same_name_is_believed() -> None:
    totals = Totals()
    totals.take({"a": tokens(10)})
    totals.take({"a": tokens(2)})
    totals.take({"a": tokens(3)})
    assert total(totals) == 13


def test_a_replica_that_was_not_heard_of_for_a_while_counts_once() -> None:
    totals = Totals()
    totals.take({"a": tokens(10)})
    totals.take({})  # the manager began anew, and has heard nobody yet
    totals.take({"a": tokens(12)})
    assert total(totals) == 12


def test_histograms_follow_the_same_rules() -> None:
    book, totals = FigureBook(), Totals()
    book.observe("seconds", 0.2, "disk")
    totals.take({"a": book.read()})
    book.observe("seconds", 0.4, "disk")
    totals.take({"a": book.read()})
    again = FigureBook()
    again.observe("seconds", 0.8, "disk")
    totals.take({"a": again.read()})
    histogram = totals.read().histograms["seconds", ("disk",)]
    assert histogram.count == 3
    assert abs(histogram.total - 1.4) < 1e-9


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.integers(min_value=0, max_value=20)),
        min_size=1,
        max_size=20,
    )
)
def test_whatever_replicas_report_the_total_never_goes_down(
    readings: list[dict[str, int]],
) -> None:
    totals, last = Totals(), 0.0
    for reading in readings:
        totals.take({source: tokens(count) for source, count in reading.items()})
        now = totals.read().counters.get(KEY, 0.0)
        assert now >= last
        last = now
