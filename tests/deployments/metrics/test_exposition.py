"""What Prometheus reads: parsed by its own client, of a real server, and of clusters whose replicas come and go."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.table import PlacementTable, ReplicaReport, TableUpdate
from cluster.view import TableView
from deployments.gateway import ReplicaOutputs
from deployments.metrics.exposition import Metrics
from deployments.metrics.families import FAMILIES
from deployments.metrics.replica import replica_figures
from deployments.metrics.requests import Measured
from deployments.metrics.top_adapters import HALFLIFE_S
from storage.figures import FigureBook
from storage.identity import AdapterSet, AdapterVersion, sha256_hex
from tests.cluster.clocks import ManualClock
from tests.deployments.conftest import LocalServer
from tests.deployments.metrics.scraping import (
    exposed,
    report_of,
    scrape,
    state_of,
    value,
)
from tests.deployments.world import BASE_ID
from workers.engine.client import EngineLoad
from workers.engine.request import EngineRequest, FinishReason, RequestOutput


def complete(server: LocalServer, model: str = BASE_ID, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_numbers_move_with_requests(local_server: LocalServer) -> None:
    local_server.world.publish("measured", rank=2, seed=77)
    before = scrape(local_server.url)
    assert complete(local_server).status_code == 200
    assert complete(local_server, "measured", stream=True).status_code == 200
    assert complete(local_server, "nobody").status_code == 404
    assert complete(local_server, temperature=99).status_code == 400
    assert httpx.get(f"{local_server.url}/no/such/path").status_code == 404
    after = scrape(local_server.url)

    def grew(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    route = {"method": "POST", "route": "/v1/completions"}
    assert grew("flora_http_requests_total", code="200", **route) == 2
    assert grew("flora_http_requests_total", code="404", **route) == 1
    assert grew("flora_http_requests_total", code="400", **route) == 1
    nowhere = {"method": "GET", "route": "other", "code": "404"}
    assert grew("flora_http_requests_total", **nowhere) == 1
    # There is no manager here whose table would tell the adapter's name.
    for adapter in ("base", "other"):
        assert grew("flora_generations_total", adapter=adapter) == 1
        assert grew("flora_prompt_tokens_total", adapter=adapter) == 3
        assert grew("flora_answer_tokens_total", adapter=adapter) == 4
    assert grew("flora_generations_ended_total", reason="length") == 2
    for tier in ("base", "registry"):
        assert grew("flora_first_token_seconds_count", tier=tier) == 1
        assert grew("flora_queue_seconds_count", tier=tier) == 1
    assert 0 < grew("flora_inter_token_seconds_count") <= 2 * 3
    assert value(after, "flora_generations", state="running") == 0


def test_a_client_that_leaves_is_told_apart(local_server: LocalServer) -> None:
    before = scrape(local_server.url)
    body = {"model": BASE_ID, "prompt": [5], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{local_server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    for _ in range(100):
        after = scrape(local_server.url)
        if not value(after, "flora_generations", state="running"):
            break
    name = "flora_generations_ended_total"
    assert value(after, name, reason="gone") - value(before, name, reason="gone") == 1


def busy_load(tokens: int) -> EngineLoad:
    book = FigureBook()
    book.observe("flora_step_seconds", 0.02, times=tokens)
    device = (AdapterVersion("a" * 64),)
    return EngineLoad(tokens_out=tokens, bank_slots=8, device=device, figures=book.read())


def report(replica_id: str, tokens: int) -> ReplicaReport:
    return report_of(replica_id, replica_figures(busy_load(tokens)))


def test_nothing_is_lost_when_a_replica_leaves_and_nothing_goes_down() -> None:
    metrics = Metrics(TableView(ManualClock()))
    tokens = "flora_engine_tokens_total"
    first = exposed(metrics, state_of(report("one", 10), report("two", 20)))
    assert value(first, tokens) == 30
    assert value(first, "flora_step_seconds_count") == 30
    assert value(first, "flora_adapters_resident", replica="two", tier="device") == 1
    # It answered five tokens more before it was killed; another takes its place and begins at zero.
    gone = exposed(
        metrics, state_of(report("one", 10), report("new", 1), left=(report("two", 25),))
    )
    assert value(gone, tokens) == 36
    assert value(gone, "flora_step_seconds_count") == 36
    assert {labels for name, labels in gone if name == "flora_kv_slots"} == {
        (("replica", "new"),),
        (("replica", "one"),),
    }
    # The manager begins anew, and has not heard of the one that left; then it is away.
    for state in (state_of(report("one", 11)), None, state_of(report("one", 11))):
        later = exposed(metrics, state)
        assert value(later, tokens) == 37
        assert value(later, "flora_placement_moves_total", change="given") == 3
        assert value(later, "flora_placement_manager_up") == (state is not None)


def test_the_registrys_state_is_a_gauge() -> None:
    metrics = Metrics(TableView(ManualClock()))
    assert value(exposed(metrics, state_of()), "flora_registry_up") == 1
    away = replace(state_of(), registry_error="no answer")
    assert ("flora_registry_up", ()) in exposed(metrics, away)
    assert value(exposed(metrics, away), "flora_registry_up") == 0


def table_of(count: int) -> tuple[TableView, list[AdapterVersion]]:
    """A view in which so many adapters of two tenants are served."""
    versions = [AdapterVersion(sha256_hex(f"{number}".encode())) for number in range(count)]
    serving = {
        ("default" if number % 2 else "acme", f"adapter-{number}", "latest"): version
        for number, version in enumerate(versions)
    }
    view = TableView(ManualClock())
    table = PlacementTable(epoch=1, serving=serving)
    assert view.offer(TableUpdate.whole(table))
    return view, versions


def begin(metrics: Metrics, version: AdapterVersion) -> Measured:
    return metrics.requests.begin(EngineRequest("r", (1, 2, 3), adapters=AdapterSet.of(version)))


def answer(metrics: Metrics, version: AdapterVersion) -> None:
    measured = begin(metrics, version)
    output = RequestOutput(
        "r", AdapterSet.of(version), (4,), FinishReason.LENGTH, adapter_tier="disk", queue_time_s=1
    )
    measured.took(ReplicaOutputs("one", (output,)))
    measured.over()


def test_a_thousand_adapters_make_few_series_and_every_request_counts() -> None:
    view, versions = table_of(1000)
    metrics = Metrics(view)
    for number, version in enumerate(versions):
        for _ in range(1 + (number < 20) * 30):
            answer(metrics, version)
    samples = exposed(metrics, state_of(report("one", 1)))
    by_adapter = {
        dict(labels)["adapter"]: count
        for (name, labels), count in samples.items()
        if name == "flora_generations_total"
    }
    assert sum(by_adapter.values()) == 1000 + 20 * 30
    assert len(by_adapter) == 20 + 1
    assert by_adapter["adapter-1"] == 31
    assert by_adapter["acme/adapter-2"] == 31
    assert len(samples) < 1000


def test_favourites_that_come_and_go_leave_no_series_behind_and_no_count_is_lost() -> None:
    view, versions = table_of(400)
    clock = ManualClock()
    metrics = Metrics(view, clock)
    long = {version: begin(metrics, version) for version in versions[:20]}
    for wave in range(1, 20):
        clock.advance(10 * HALFLIFE_S)
        favourites = versions[20 * wave :][:20]
        for version in favourites * 6:
            answer(metrics, version)
        for version, measured in long.items():  # its label is lost, and must not come again
            token = RequestOutput("r", AdapterSet.of(version), (4,))
            measured.took(ReplicaOutputs("one", (token,)))
        samples = exposed(metrics, None)
        begun, tokens = 20 + 120 * wave, 140 * wave
        for name, total in (
            ("flora_generations_total", begun),
            ("flora_prompt_tokens_total", 3 * begun),
            ("flora_answer_tokens_total", tokens),
        ):
            series = [number for (family, _), number in samples.items() if family == name]
            assert len(series) == 20 + 1, name
            assert sum(series) == total, name


def test_adapters_under_way_are_told_as_vllm_tells_them() -> None:
    view, versions = table_of(40)
    metrics = Metrics(view)
    waiting, running = begin(metrics, versions[1]), begin(metrics, versions[3])
    running.took(ReplicaOutputs("one", (RequestOutput("r", AdapterSet.of(versions[3]), (4,)),)))
    state = state_of(report("one", 1), report("two", 1))

    def told() -> dict[str, str]:
        [labels] = [
            dict(labels)
            for name, labels in exposed(metrics, state)
            if name == "vllm:lora_requests_info"
        ]
        return labels

    assert told() == {
        "running_lora_adapters": "adapter-3",
        "waiting_lora_adapters": "adapter-1",
        "max_lora": "16",
    }
    for version in versions[4:]:
        begin(metrics, version)
    assert told()["waiting_lora_adapters"].count(",") <= 20
    assert told()["waiting_lora_adapters"].endswith("other")
    running.over()
    assert told()["running_lora_adapters"] == ""
    waiting.over()


def test_every_figure_of_a_replica_has_a_family_with_its_labels(local_server: LocalServer) -> None:
    local_server.world.publish("figured", rank=1, seed=78)
    assert complete(local_server, "figured").status_code == 200
    figures = replica_figures(local_server.gateway.client.load())
    shapes = {family.name: (family.kind, len(family.labels)) for family in FAMILIES}
    kinds = {
        "counter": figures.counters,
        "gauge": figures.gauges,
        "histogram": figures.histograms,
    }
    for kind, (name, labels) in itertools.chain.from_iterable(
        zip(itertools.repeat(kind), keys) for kind, keys in kinds.items()
    ):
        apart = kind == "gauge"  # the replica's own label comes with the exposition
        assert shapes.get(name) == (kind, len(labels) + apart), name


def test_names_have_units_and_every_family_says_what_it_is() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert family.help.endswith((".", "}")) or family.name.startswith("vllm:"), family.name
        assert family.name.startswith(("flora_", "vllm:")), family.name
        assert (family.kind == "counter") == family.name.endswith("_total"), family.name


def test_openmetrics_is_spoken_to_those_who_ask_for_it(local_server: LocalServer) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    response = httpx.get(f"{local_server.url}/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize("age_s", [0.0, math.inf])
def test_the_tables_age_is_told_even_when_there_is_none(age_s: float) -> None:
    clock = ManualClock()
    view = TableView(clock)
    if not math.isinf(age_s):
        view.offer(TableUpdate.whole(PlacementTable(epoch=1)))
    assert value(exposed(Metrics(view), None), "flora_table_age_seconds") == age_s
