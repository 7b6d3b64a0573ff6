"""One thread for each process's view of the placement table, as long as the process has a Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cluster.actor import PlacementSpec
from cluster.config import ClusterSettings
from deployments import table_poller
from storage.config import StorageSettings


def pollers() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name == "placement-poller"}


def test_polling_ends_with_the_processs_ray_and_a_later_caller_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking on would start another Ray, in a process that has just ended its own."""
    others = pollers()  # of tests before this one, whose Ray goes on
    has_ray, was_asked = threading.Event(), threading.Event()

    def is_initialized() -> bool:
        return threading.current_thread() in others or has_ray.is_set()

    def connect(spec: PlacementSpec) -> None:
        was_asked.set()
        raise ValueError("no such actor")

    stand_in = SimpleNamespace(is_initialized=is_initialized, get=ray.get)
    monkeypatch.setattr(table_poller, "ray", stand_in)
    monkeypatch.setattr(table_poller, "connect", connect)
    spec = PlacementSpec(
        app_name="poller",
        base_id="base",
        cluster=ClusterSettings(heartbeat_s=0.01),
        storage=StorageSettings(registry=str(tmp_path)),
    )
    views = []
    for _ in range(2):
        was_asked.clear()
        has_ray.set()
        views.append(table_poller.shared_view(spec))
        assert table_poller.shared_view(spec) is views[-1]
        assert was_asked.wait(30)
        (thread,) = pollers() - others
        has_ray.clear()
        thread.join(30)
        assert not thread.is_alive()
    assert views[0] is not views[1]
