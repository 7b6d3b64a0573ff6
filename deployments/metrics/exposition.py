"""The text Prometheus reads: figures of this ingress, of the cluster, and of its replicas, in a registry of our own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cluster.state import ClusterState
from cluster.view import TableView
from deployments.metrics.families import FAMILIES, REPLICAS_APART, Family
from deployments.metrics.requests import RUNNING, WAITING, RequestMetrics
from deployments.metrics.totals import Totals
from storage.figures import FigureKey, Figures, Histogram

Value = TypeVar("Value")

_NONE = Figures()


@dataclass(frozen=True, slots=True)
class Exposition:
    """What to answer a scrape."""

    content_type: str
    body: bytes


class Metrics:
    """All metrics one ingress shows. Any thread, one at a time.

    Args:
        view: of the placement table, whose age is told.
        clock: seconds; only differences matter.
    """

    def __init__(self, view: TableView, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = RequestMetrics(view, clock)
        self._view = view
        self._totals = Totals()
        self._lock = threading.Lock()
        self._shown = _Shown()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._shown)

    def expose(
        self, state: ClusterState | None, accept: str = "", training: Figures = _NONE
    ) -> Exposition:
        """The exposition in the format that an `Accept` header prefers.

        Args:
            state: None while the placement manager does not answer: counts stay as they were, gauges that only it
                knows are not shown, and `flora_placement_manager_up` is 0.
            training: of the jobs that this ingress sees to.
        """
        encode, content_type = choose_encoder(accept)
        with self._lock:
            self._shown.figures = self._figures(state).merged(training)
            return Exposition(content_type, encode(self._registry))

    def _figures(self, state: ClusterState | None) -> Figures:
        known = Figures()
        if state is not None:
            self._totals.take(state.figures)
            known = _of_cluster(state).merged(_of_live_replicas(state))
        own = Figures(
            gauges={
                ("flora_placement_manager_up", ()): float(state is not None),
                ("flora_table_age_seconds", ()): self._view.age_s,
                self._lora_info(known): time.time(),
            }
        )
        return self.requests.read().merged(own).merged(known).merged(self._totals.read())

    def _lora_info(self, known: Figures) -> FigureKey:
        slots = sum(
            value for (name, _), value in known.gauges.items() if name == "flora_bank_slots"
        )
        running, waiting = (
            ",".join(self.requests.adapters_under_way(state)) for state in (RUNNING, WAITING)
        )
        return "vllm:lora_requests_info", (running, waiting, str(int(slots)))


def _of_cluster(state: ClusterState) -> Figures:
    gauges = {
        "flora_placement_epoch": state.table.epoch,
        "flora_placement_adapters": len(state.table.holders),
        "flora_placement_unplaced_adapters": len(state.no_room) + len(state.too_large),
        "flora_aliases_waiting": len(state.moves),
        "flora_versions_failed": len(state.failed),
        "flora_registry_up": state.registry_error is None,
        "flora_replicas": len(state.reports),
    }
    return Figures(gauges={(name, ()): float(value) for name, value in gauges.items()})


def _of_live_replicas(state: ClusterState) -> Figures:
    known = {family.name for family in REPLICAS_APART}
    return Figures(
        gauges={
            (name, (report.replica_id, *labels)): value
            for report in state.reports
            for (name, labels), value in report.figures.gauges.items()
            if name in known
        }
    )


class _Shown(Collector):
    """Figures in the shape of `prometheus_client`, each family with its help."""

    def __init__(self) -> None:
        self.figures = Figures()

    def collect(self) -> Iterable[Metric]:
        for family in FAMILIES:
            yield _metric(family, self.figures)


def _metric(family: Family, figures: Figures) -> Metric:
    """Raises ValueError when a figure has other labels than its family."""
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, value in _values(family, figures.histograms):
            histogram.add_metric(labels, _buckets(value), value.total)
        return histogram
    if family.kind == "counter":
        counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
        for labels, number in _values(family, figures.counters):
            counter.add_metric(labels, number)
        return counter
    gauge = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, number in _values(family, figures.gauges):
        gauge.add_metric(labels, number)
    return gauge


def _values(
    family: Family, figures: Mapping[FigureKey, Value]
) -> Iterable[tuple[tuple[str, ...], Value]]:
    return ((labels, value) for (name, labels), value in figures.items() if name == family.name)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
