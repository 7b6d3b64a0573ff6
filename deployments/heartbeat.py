"""A replica's heartbeat: report to the placement manager, obey its orders. A thread of its own, whatever steps take."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
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
        told: ReplicaReport | None = None  # what this manager knows
        while True:
            report = self._report()
            if report is not None:
                try:
                    manager = manager or connect(self._spec)
                    answer = manager.heartbeat.remote(brief(report, told))
                    orders = ray.get(answer, timeout=_ANSWER_TIMEOUT_S)
                except (RayError, ValueError) as error:
                    # The replica serves on; the manager comes back and learns of it from the next report.
                    _log.warning("the placement manager does not answer: %s", type(error).__name__)
                    manager = told = None
                else:
                    told = None if orders is not None and orders.asks_all else report
                    if orders is not None:
                        self._obey(orders)
            time.sleep(self._spec.cluster.heartbeat_s)


def brief(report: ReplicaReport, told: ReplicaReport | None) -> ReplicaReport:
    """The report without what its receiver knows from the one it was told before."""
    if told is None or (report.host, report.disk) != (told.host, told.disk):
        return report
    return replace(report, host=(), disk=(), is_brief=True)
