"""Keeps this process's view of the placement table fresh: one thread that asks the manager twice a second."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.actor import PlacementSpec, connect
from cluster.view import TableView

_ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)
_views: dict[str, TableView] = {}
_lock = threading.Lock()


def shared_view(spec: PlacementSpec) -> TableView:
    """The view of this process for `spec`; its thread starts with the first caller and ends with this process's Ray.

    An ingress and the request routers beside it thus read one table and report demand once.
    """
    with _lock:
        view = _views.get(spec.actor_name)
        if view is None:
            view = _views[spec.actor_name] = TableView(time.monotonic, spec.cluster.table_ttl_s)
            threading.Thread(
                target=_poll_to_the_end, args=(spec, view), name="placement-poller", daemon=True
            ).start()
        return view


def _poll_to_the_end(spec: PlacementSpec, view: TableView) -> None:
    try:
        _poll(spec, view)
    finally:
        with _lock:
            _views.pop(spec.actor_name)


def _poll(spec: PlacementSpec, view: TableView) -> None:
    manager: Any = None
    while ray.is_initialized():  # or asking would start a Ray of its own
        report = view.take_report()
        try:
            manager = manager or connect(spec)
            view.offer(ray.get(manager.poll.remote(report), timeout=_ANSWER_TIMEOUT_S))
        except (RayError, GetTimeoutError, ValueError) as error:
            # Routers go on with the last good table; the next round looks the manager up again.
            _log.warning("the placement manager does not answer: %s", type(error).__name__)
            view.give_back(report)
            manager = None
        time.sleep(spec.cluster.heartbeat_s)
