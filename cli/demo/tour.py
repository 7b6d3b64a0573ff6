"""Ask each adapter in turn and watch the cluster: who loads it, from where, and whom it drives out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cli.client import ApiClient
from cli.demo.questions import Question, ask_one

_TIERS_OF_A_COLD_LOAD = ("registry", "disk")
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of the tour. `evicted` are the adapters that left the replica's device with it."""

    model: str
    replica: str
    tier: str
    seconds: float
    evicted: tuple[str, ...]

    @property
    def is_cold_load(self) -> bool:
        return self.tier in _TIERS_OF_A_COLD_LOAD


def tour(
    client: ApiClient,
    questions: Sequence[Question],
    versions: Mapping[str, str],
    heartbeat_s: float,
    on_visit: Callable[[Visit], None],
) -> list[Visit]:
    """Ask the questions one after another, in rounds, until a cold load and an eviction were seen.

    Args:
        versions: adapter → version, to name what was evicted.
        heartbeat_s: how old the cluster's word about a replica may be.
    """
    names = {version: name for name, version in versions.items()}
    visits: list[Visit] = []
    before = _devices(client)
    for _ in range(_ROUNDS):
        for question in questions:
            started_s = time.monotonic()
            served = ask_one(client, question).served
            seconds = time.monotonic() - started_s
            time.sleep(3 * heartbeat_s)  # until the replica has told what it holds now
            after = _devices(client)
            gone = before.get(served.replica, set()) - after.get(served.replica, set())
            evicted = tuple(sorted(names.get(version, version[:12]) for version in gone))
            visits.append(Visit(question.model, served.replica, served.tier, seconds, evicted))
            on_visit(visits[-1])
            before = after
        if any(visit.is_cold_load for visit in visits) and any(visit.evicted for visit in visits):
            break
    return visits


def _devices(client: ApiClient) -> dict[str, set[str]]:
    cluster: dict[str, Any] = client.get("/v1/cluster")
    return {replica["id"]: set(replica["device"]) for replica in cluster["replicas"]}
