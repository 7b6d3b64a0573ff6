"""Replicas of one machine share its cores, and never compute on more of them than there are."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployments.replica_threads import replica_threads
from deployments.settings import ServeSettings, Settings
from workers.config import EngineSettings


def settings(replicas: int, cpus: float, threads: int = 0) -> Settings:
    return Settings(
        engine=EngineSettings(threads=threads),
        serve=ServeSettings(min_replicas=replicas, max_replicas=replicas, cpus_per_replica=cpus),
    )


@pytest.mark.parametrize(
    ("replicas", "cpus_per_replica", "usable", "node_cpus", "expected"),
    [
        (1, 1.0, 8, 8, 8),  # alone on a laptop
        (2, 1.0, 8, 8, 4),
        (2, 1.0, 2, 6, 1),  # Ray hands out more than there is: replicas still share what there is
        (3, 4.0, 2, 20, 1),
        (8, 2.0, 16, 16, 2),
        (8, 8.0, 16, 16, 8),  # a machine of a cluster that only two of the eight fit on
        (2, 0.5, 1, 1, 1),
    ],
)
def test_cores_are_divided_by_the_replicas_that_can_be_on_the_machine(
    replicas: int, cpus_per_replica: float, usable: int, node_cpus: float, expected: int
) -> None:
    threads = replica_threads(
        settings(replicas, cpus_per_replica), usable_cpus=usable, node_cpus=node_cpus
    )
    assert threads == expected
    on_machine = min(replicas, max(1, int(node_cpus / cpus_per_replica)))
    assert threads == 1 or threads * on_machine <= usable


def test_what_the_settings_name_is_what_is_used() -> None:
    assert replica_threads(settings(4, 1.0, threads=6), usable_cpus=2, node_cpus=2) == 6


def test_a_replica_of_a_number_that_varies_leaves_room_for_as_many_as_there_may_be() -> None:
    serve = ServeSettings(min_replicas=1, max_replicas=4, cpus_per_replica=0.5)
    assert replica_threads(Settings(serve=serve), usable_cpus=8, node_cpus=8) == 2


def test_a_number_that_varies_downwards_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas is less than min_replicas"):
        ServeSettings(min_replicas=3, max_replicas=2)
