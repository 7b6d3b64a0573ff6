"""Reading an exposition as Prometheus does, and a cluster to be read."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.figures import MANAGER
from cluster.state import ClusterState
from cluster.table import PlacementTable, ReplicaReport
from deployments.metrics.exposition import Metrics
from storage.figures import Figures
from storage.identity import AdapterVersion

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""By name and sorted labels."""


def parse(text: str) -> Samples:
    samples = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(dict(samples)) == len(samples), "a series is there twice"
    return dict(samples)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def scrape(url: str) -> Samples:
    response = httpx.get(f"{url}/metrics", timeout=30)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parse(response.text)


def exposed(metrics: Metrics, state: ClusterState | None) -> Samples:
    return parse(metrics.expose(state).body.decode())


def report_of(replica_id: str, figures: Figures) -> ReplicaReport:
    return ReplicaReport(replica_id, rows=8, num_bytes=1, figures=figures)


def state_of(*reports: ReplicaReport, left: tuple[ReplicaReport, ...] = ()) -> ClusterState:
    """A cluster of these replicas; `left` were heard of a moment ago."""
    figures = {one.replica_id: one.figures for one in (*reports, *left)}
    moves = Figures(
        counters={("flora_placement_moves_total", (kind,)): 3.0 for kind in ("given", "taken")}
    )
    return ClusterState(
        PlacementTable(epoch=7, holders={AdapterVersion("a" * 64): ("one",)}),
        reports=reports,
        figures={**figures, MANAGER: moves},
    )
