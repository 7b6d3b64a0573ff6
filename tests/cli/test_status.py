"""`flora status`: what a person reads of a cluster, large or small, in a narrow terminal and a wide one."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from cli.status import cluster_view
from cluster.state import AliasMove, ClusterState
from cluster.table import AdapterFacts, PlacementTable, ReplicaReport
from deployments.cluster_api import cluster_view as cluster_json
from deployments.residency import residency
from storage.identity import AdapterVersion, sha256_hex
from tests.cli.conftest import Flora, as_json


def version_of(name: str) -> AdapterVersion:
    return AdapterVersion(sha256_hex(name.encode()))


def cluster(num_replicas: int, num_adapters: int, limit: int | None = None, **parts: Any) -> Any:
    """What `/v1/cluster` answers: each replica has every `num_replicas`-th adapter on its device."""
    names = [f"adapter-{number:04d}" for number in range(num_adapters)]
    reports = tuple(
        ReplicaReport(
            replica_id=f"id-{index}",
            rows=64,
            num_bytes=1,
            device=tuple(version_of(name) for name in names[index::num_replicas][:16]),
            disk=tuple(version_of(name) for name in names[:100]),
            tokens_out=1_234_567,
        )
        for index in range(num_replicas)
    )
    state = ClusterState(
        PlacementTable(
            epoch=7,
            base_id="base",
            serving={("default", name, "latest"): version_of(name) for name in names},
            facts={version_of(name): AdapterFacts(4, 1) for name in names},
        ),
        reports=parts.pop("reports", reports),
        demand={version_of(name): 1000.0 - number for number, name in enumerate(names)},
        **parts,
    )
    told = {
        **cluster_json(state),
        "replica_range": {"min": 1, "max": 4},
        **residency(state, None, limit),
    }
    return json.loads(json.dumps(told))


def shown(told: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(cluster_view(told, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize(("num_replicas", "num_adapters"), [(2, 5), (4, 1000)])
def test_every_row_is_one_line_of_the_terminal(
    width: int, num_replicas: int, num_adapters: int
) -> None:
    text = shown(cluster(num_replicas, num_adapters, limit=20), width)
    rows = [line for line in text.splitlines() if line.startswith("adapter-")]
    assert len(rows) == min(20, num_adapters)
    assert all(version_of(row.partition("@")[0])[:12] in row for row in rows)
    assert all(len(line) <= width for line in text.splitlines())
    assert f"{num_replicas} replicas of 1 to 4" in text and "epoch 7" in text
    assert ("1,234,567" in text) == (width == 140)


def test_the_most_asked_for_come_first_and_the_rest_is_summed_up() -> None:
    text = shown(cluster(4, 1000, limit=20), 140)
    rows = [line.partition("@")[0] for line in text.splitlines() if line.startswith("adapter-")]
    assert rows == [f"adapter-{number:04d}" for number in range(20)]
    assert "980 more (--all)" in text
    assert "64 on a device, 0 in memory, 36 on disk, 900 in the registry only" in text
    assert "more (--all)" not in shown(cluster(4, 30), 140)


def test_an_alias_that_lags_says_why_and_a_version_that_cannot_be_served_too() -> None:
    desired = version_of("better")
    move = AliasMove(desired, version_of("adapter-0001"), "warming on 1 of 2 replicas")
    told = cluster(
        2,
        5,
        moves={("default", "adapter-0001", "latest"): move},
        failed={desired: "a file has other bytes than its digest says"},
    )
    text = " ".join(shown(told, 80).split())
    expected = (
        f"adapter-0001@latest serves {move.serving[:12]}, not yet {desired[:12]}: {move.reason}"
    )
    assert expected in text
    assert f"{desired[:12]} cannot be served: a file has other bytes" in text


def test_a_registry_that_is_away_is_told() -> None:
    assert "registry up" in shown(cluster(2, 5), 140)
    assert "registry down" in shown(cluster(2, 5, registry_error="refused"), 140)
    report = ReplicaReport("id", 1, 1, is_registry_up=False)
    assert "down for 1 of 1 replicas" in shown(cluster(1, 5, reports=(report,)), 140)


def test_names_are_text_and_not_markup() -> None:
    told = cluster(1, 1)
    told["adapters"][0]["failed"] = "x"
    told["registry_error"] = "[bold]what[/nothing]"
    assert "[bold]what[/nothing]" in shown(told, 140)


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            limit = int(query["limit"][0]) if "limit" in query else None
            body = json.dumps(cluster(2, 50, limit)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_short_list_unless_all_is_asked_for(flora: Flora, url: str) -> None:
    assert flora("status", "--url", url).stdout.count("@latest") == 20
    assert flora("status", "--all", "--url", url).stdout.count("@latest") == 50
    told = as_json(flora("status", "--json", "--url", url))
    assert len(told["adapters"]) == 50
    assert told["cluster"]["epoch"] == 7
