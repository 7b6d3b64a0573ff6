"""The router answers Serve with single replicas in our order, puts lost ones last, and tells of them. No Ray runs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.config import RequestRouterConfig

from cluster.config import ClusterSettings
from cluster.failing_replicas import Outcome
from cluster.view import TableView
from deployments import router as router_module
from deployments.gateway import PreviewsOf
from deployments.outcomes import shared_outcomes
from deployments.router import AdapterRouter
from deployments.settings import Settings
from storage.identity import AdapterSet, AdapterVersion
from workers.engine.request import EngineRequest, SamplingParams

DEPLOYMENT = DeploymentID("Engine", "flora")
ONE = AdapterVersion("1" * 64)
LOOP = asyncio.new_event_loop()


@dataclass
class Replica:
    replica_id: ReplicaID


@dataclass
class Metadata:
    internal_request_id: str


@dataclass
class Pending:
    args: list[Any]
    metadata: Metadata
    future: asyncio.Future[Any] = field(default_factory=LOOP.create_future)


REPLICAS = [Replica(ReplicaID(name, DEPLOYMENT)) for name in ("a", "b", "c")]


@pytest.fixture
def view() -> TableView:
    return TableView(time.monotonic, ClusterSettings().table_ttl_s)


@pytest.fixture
def router(view: TableView, monkeypatch: pytest.MonkeyPatch) -> AdapterRouter:
    monkeypatch.setattr(router_module, "shared_view", lambda spec: view)
    router = AdapterRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    settings = Settings()
    router.initialize_state(
        {
            "app_name": "flora",
            "base_id": "base",
            "cluster": settings.cluster.model_dump(mode="json"),
            "storage": settings.storage.model_dump(mode="json"),
        }
    )
    return router


def pending(name: str, *more: Any, version: AdapterVersion | None = ONE) -> Pending:
    request = EngineRequest(name, (1,), SamplingParams(), AdapterSet.of(version))
    return Pending([request, *more], Metadata(f"serve-{name}"))


def order(router: AdapterRouter, asked: Pending | None) -> list[str]:
    groups = LOOP.run_until_complete(router.choose_replicas(REPLICAS, asked))
    assert all(len(group) == 1 for group in groups)
    return [group[0].replica_id.unique_id for group in groups]


@pytest.mark.parametrize("version", [ONE, None])
def test_every_candidate_is_tried_one_after_another(
    router: AdapterRouter, version: AdapterVersion | None
) -> None:
    assert sorted(order(router, pending("r", version=version))) == ["a", "b", "c"]
    assert sorted(order(router, None)) == ["a", "b", "c"], "a ping has no request"


def test_a_replica_that_failed_this_request_is_tried_last(router: AdapterRouter) -> None:
    first = order(router, pending("r"))[0]
    again = order(router, pending("r-again", first))
    assert again[-1] == first and sorted(again) == ["a", "b", "c"]


def test_a_dead_replica_is_tried_last_by_everybody_and_reported(
    router: AdapterRouter, view: TableView
) -> None:
    first = order(router, pending("r"))[0]
    router.on_replica_actor_died(ReplicaID(first, DEPLOYMENT))
    assert order(router, pending("other"))[-1] == first
    assert view.take_report().lost == {first}


def test_an_unreachable_replica_is_tried_last_and_nobody_else_is_told(
    router: AdapterRouter, view: TableView
) -> None:
    router.on_replica_actor_unavailable(ReplicaID("b", DEPLOYMENT))
    assert order(router, pending("r"))[-1] == "b"
    assert not view.take_report().lost


def test_demand_is_counted_once_for_each_attempt(router: AdapterRouter, view: TableView) -> None:
    asked = pending("r")
    for _ in range(3):  # Serve asks again while all are full
        order(router, asked)
    router.on_request_routed(asked, ReplicaID("c", DEPLOYMENT), None)
    assert view.take_report().demand[ONE].requests == 1
    router.on_request_completed(ReplicaID("c", DEPLOYMENT), "serve-r")


def test_a_request_that_was_rejected_is_one_demand_and_no_lesson_on_time(
    router: AdapterRouter, view: TableView
) -> None:
    asked = pending("r")
    usual = router._routing._turn_s
    for _ in range(3):
        first = order(router, asked)[0]
        asked.future.set_result(first)
        router.on_request_completed(ReplicaID(first, DEPLOYMENT), "serve-r")
        asked.future = LOOP.create_future()  # Serve tries the same request again
    assert router._routing._turn_s == usual
    order(router, asked)
    router.on_request_routed(asked, ReplicaID("c", DEPLOYMENT), None)
    assert view.take_report().demand[ONE].requests == 1
    router.on_request_completed(ReplicaID("b", DEPLOYMENT), "serve-r")
    assert router._routing.is_chosen("serve-r"), "a late word of a rejection ends nothing"
    router.on_request_completed(ReplicaID("c", DEPLOYMENT), "serve-r")
    assert not router._routing.is_chosen("serve-r")
    assert router._routing._turn_s != usual


def test_a_request_cancelled_while_it_waits_is_no_longer_under_way(router: AdapterRouter) -> None:
    asked = pending("r")
    order(router, asked)
    order(router, asked)
    assert router._routing.is_chosen("serve-r")
    asked.future.cancel()
    order(router, asked)  # Serve may ask once more before it notices
    assert not router._routing.is_chosen("serve-r")


@pytest.mark.parametrize("is_told_first", [True, False])
def test_a_replica_whose_request_failed_is_tried_last_whoever_tells_first(
    router: AdapterRouter, is_told_first: bool
) -> None:
    asked = pending("r", version=None)
    first = order(router, asked)[0]
    replica_id = ReplicaID(first, DEPLOYMENT)
    router.on_request_routed(asked, replica_id, None)
    if is_told_first:
        shared_outcomes().tell("r", Outcome.FAILED)
        router.on_request_completed(replica_id, "serve-r")
    else:
        router.on_request_completed(replica_id, "serve-r")
        shared_outcomes().tell("r", Outcome.FAILED)
    assert order(router, pending("next", version=None))[-1] == first
    shared_outcomes().tell("r", Outcome.ANSWERED)
    assert order(router, pending("later", version=None))[-1] != first
    shared_outcomes().forget("r")


def test_a_failed_request_that_is_sent_again_goes_elsewhere(router: AdapterRouter) -> None:
    asked = pending("again")
    first = order(router, asked)[0]
    router.on_request_routed(asked, ReplicaID(first, DEPLOYMENT), None)
    shared_outcomes().tell("again", Outcome.FAILED)
    assert order(router, pending("again-again"))[-1] == first
    shared_outcomes().forget("again")


def test_serve_can_send_the_router_to_its_controller() -> None:
    """It pickles the class with every object its module names: none may hold a lock."""
    config = RequestRouterConfig(request_router_class="deployments.router.AdapterRouter")
    assert config.get_request_router_class().__name__ == "AdapterRouter"


def test_previews_come_from_the_replica_they_are_of(router: AdapterRouter) -> None:
    asked = Pending([PreviewsOf("b", "reader")], Metadata("serve-p"))
    assert order(router, asked) == ["b"]
    gone = Pending([PreviewsOf("gone", "reader")], Metadata("serve-q"))
    assert sorted(order(router, gone)) == ["a", "b", "c"]
