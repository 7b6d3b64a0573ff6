"""What a manager remembers for whoever watches."""

from __future__ import annotations

from cluster.figures import MANAGER, ClusterFigures
from cluster.table import ReplicaReport
from storage.figures import Figures
from storage.identity import AdapterVersion

A, B = AdapterVersion("a" * 64), AdapterVersion("b" * 64)


def report(replica_id: str, tokens: float) -> ReplicaReport:
    figures = Figures(counters={("tokens", ()): tokens})
    return ReplicaReport(replica_id, rows=8, num_bytes=1, figures=figures)


def moves(figures: ClusterFigures) -> tuple[float, float]:
    counters = figures.read()[MANAGER].counters
    given, taken = (
        counters["flora_placement_moves_total", (change,)] for change in ("given", "taken")
    )
    return given, taken


def test_the_last_report_of_a_replica_outlives_it() -> None:
    figures = ClusterFigures()
    figures.heard(report("one", 5))
    figures.heard(report("one", 7))
    for number in range(200):
        figures.heard(report(f"later-{number}", 1))
    assert figures.read()["one"].counters["tokens", ()] == 7


def test_memory_of_replicas_is_bounded() -> None:
    figures = ClusterFigures()
    for number in range(2000):
        figures.heard(report(f"replica-{number}", 1))
    assert len(figures.read()) < 300


def test_moves_are_what_a_plan_changes_and_an_order_of_holders_is_none() -> None:
    figures = ClusterFigures()
    figures.planned({A: ("one", "two"), B: ("one",)})
    assert moves(figures) == (3, 0)
    figures.planned({A: ("two", "one"), B: ("one",)})
    assert moves(figures) == (3, 0)
    figures.planned({A: ("one", "three")})
    assert moves(figures) == (4, 2)
