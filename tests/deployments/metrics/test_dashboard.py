"""The Grafana dashboard shows what is really exported, and all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from cluster.view import TableView
from deployments.metrics.exposition import Metrics
from deployments.metrics.families import FAMILIES
from deployments.metrics.replica import replica_figures
from tests.cluster.clocks import ManualClock
from tests.deployments.conftest import LocalServer
from tests.deployments.metrics.scraping import exposed, report_of, scrape, state_of
from tests.deployments.world import BASE_ID

DASHBOARD = Path(__file__).parents[3] / "k8s" / "grafana-dashboard.json"


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def named() -> set[str]:
    """Names of metrics, as expressions have them."""
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    return {name for text in expressions for name in re.findall(r"\b(?:flora_|vllm:)\w+", text)}


def test_every_metric_of_the_dashboard_is_exported(local_server: LocalServer) -> None:
    local_server.world.publish("on-the-dashboard", rank=1, seed=79)
    for model in (BASE_ID, "on-the-dashboard"):
        body = {"model": model, "prompt": [5, 6], "max_tokens": 4, "ignore_eos": True}
        httpx.post(f"{local_server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    here = {name for name, _ in scrape(local_server.url)}
    # What the manager and the heartbeats bring, of the same engine.
    figures = replica_figures(local_server.gateway.client.load())
    cluster = exposed(Metrics(TableView(ManualClock())), state_of(report_of("one", figures)))
    exported = here | {name for name, _ in cluster}
    assert named() <= exported, named() - exported


def test_every_metric_but_vllms_is_on_the_dashboard() -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named()}
    ours = {family.name for family in FAMILIES if family.name.startswith("flora_")}
    assert ours <= shown, ours - shown


def test_panels_do_not_overlap_and_each_has_a_title_and_a_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
    identities = [panel["id"] for panel in panels()]
    assert len(set(identities)) == len(identities)
