"""Figures add up, cross processes and tell quantiles."""

from __future__ import annotations

import pickle
import threading

import pytest

from storage.figures import COUNTS, SECONDS, FigureBook, Figures, Histogram


def histogram(*values: float, bounds: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Histogram:
    book = FigureBook()
    for value in values:
        book.observe("x", value, bounds=bounds)
    return book.read().histograms["x", ()]


def test_a_value_on_a_bound_belongs_below_it_as_prometheus_has_it() -> None:
    assert histogram(0.5, 1.0, 1.5, 4.0, 9.0).counts == (2, 1, 1, 1)


def test_the_sum_of_two_histograms_is_that_of_all_their_values() -> None:
    both = histogram(0.5, 3.0) + histogram(9.0)
    assert both == histogram(0.5, 3.0, 9.0)
    assert both - histogram(9.0) == histogram(0.5, 3.0)
    with pytest.raises(ValueError, match="different buckets"):
        both + histogram(1.0, bounds=(1.0,))


def test_quantiles_lie_in_the_right_bucket() -> None:
    many = histogram(*[0.5] * 98, 1.5, 3.0)
    assert many.quantile(0.5) <= 1.0
    assert 1.0 < many.quantile(0.985) <= 2.0
    assert 2.0 < many.quantile(1.0) <= 4.0
    assert histogram(9.0).quantile(0.5) == 4.0  # more is not known
    assert Histogram((1.0,), (0, 0), 0.0).quantile(0.99) == 0.0


def test_threads_lose_no_observation() -> None:
    book = FigureBook()

    def work() -> None:
        for _ in range(2000):
            book.count("loads", "disk")
            book.observe("seconds", 0.003, "disk", times=2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = book.read()
    assert figures.counters["loads", ("disk",)] == 8000
    assert figures.histograms["seconds", ("disk",)].count == 16000
    assert figures.histograms["seconds", ("disk",)].total == pytest.approx(48.0)


def test_a_series_that_is_folded_ends_and_its_count_goes_on_elsewhere() -> None:
    book = FigureBook()
    book.count("requests", "a", by=2.0)
    book.count("tokens", "a")
    book.fold("requests", ("a",), into=("other",))
    book.fold("requests", ("never",), into=("other",))
    assert book.read().counters == {("requests", ("other",)): 2.0, ("tokens", ("a",)): 1.0}
    book.count("requests", "other")
    book.fold("requests", ("other",), into=("other",))
    assert book.read().counters["requests", ("other",)] == 3.0


def test_figures_cross_processes_and_later_readings_do_not_change_them() -> None:
    book = FigureBook()
    book.observe("seconds", 1.0, bounds=SECONDS)
    book.observe("rows", 100.0, bounds=COUNTS)
    figures = book.read()
    sent = pickle.dumps(figures)
    book.observe("seconds", 1.0)
    assert pickle.loads(sent) == figures
    assert figures.histograms["seconds", ()].count == 1


def test_merged_figures_have_all_keys_and_the_others_values() -> None:
    first = Figures(counters={("a", ()): 1.0, ("b", ()): 1.0})
    second = Figures(counters={("b", ()): 2.0}, gauges={("c", ("x",)): 3.0})
    assert first.merged(second) == Figures({("a", ()): 1.0, ("b", ()): 2.0}, {("c", ("x",)): 3.0})
