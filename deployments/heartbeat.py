"""A replica's heartbeat: report to the placement manager, obey its orders. A thread of its own, whatever steps take."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.actor import PlacementSpec, connect
from cluster.table import ReplicaOrders, ReplicaReport

_ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class Heartbeat:
    """Starts with `start`, ends with the process.

    Args:
        report: what to tell; None while there is nothing good to tell, and then nobody is told.
        obey: takes the orders; called from the heartbeat's thread.
    """

    def __init__(
        self,
        spec: PlacementSpec,
        report: Callable[[], ReplicaReport | None],
        obey: Callable[[ReplicaOrders], None],
    ) -> None:
        self._spec = spec
        self._report = report
        self._obey = obey

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        manager: Any = None
        while True:
            report = self._report()
            if report is not None:
                try:
                    manager = manager or connect(self._spec)
                    orders = ray.get(manager.heartbeat.remote(report), timeout=_ANSWER_TIMEOUT_S)
                except (RayError, ValueError) as error:
                    # The replica serves on; the manager comes back and learns of it from the next report.
                    _log.warning("the placement manager does not answer: %s", type(error).__name__)
                    manager = None
                else:
                    self._obey(orders)
            time.sleep(self._spec.cluster.heartbeat_s)
