"""A reader's view of the placement table: the last good one. Epochs only grow; the view knows how old it is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.table import DemandSample, PlacementTable, TableUpdate
from storage.identity import AdapterVersion


class TableView:
    """Shared by the threads of one process: a poller offers updates, routers and the ingress read `table`.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._table = PlacementTable()
        self._heard_s = -math.inf
        self._demand: dict[AdapterVersion, DemandSample] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()

    @property
    def table(self) -> PlacementTable:
        return self._table

    @property
    def age_s(self) -> float:
        """Seconds since a manager last confirmed or replaced this table; infinite before the first time."""
        return self._clock() - self._heard_s

    def offer(self, update: TableUpdate) -> bool:
        """Take an update unless it is older than what is held. True if it was taken."""
        with self._lock:
            if update.epoch < self._table.epoch:
                return False
            if update.epoch > self._table.epoch:
                if update.table is None:
                    return False
                self._table = update.table
            else:
                self._table = replace(
                    self._table, replicas=update.replicas, residents=update.residents
                )
            self._heard_s = self._clock()
            return True

    def record(self, version: AdapterVersion, work: float) -> None:
        """Count one request for `version`, to be reported with the next poll."""
        with self._lock:
            before = self._demand.get(version, DemandSample(0, 0.0))
            self._demand[version] = DemandSample(before.requests + 1, before.work + work)

    def take_demand(self) -> Mapping[AdapterVersion, DemandSample]:
        """What was recorded since the last call."""
        with self._lock:
            taken, self._demand = self._demand, {}
            return taken

    def record_lost(self, replica_id: str) -> None:
        """A router found this replica dead; to be reported with the next poll."""
        with self._lock:
            self._lost.add(replica_id)

    def take_lost(self) -> frozenset[str]:
        """What was recorded since the last call."""
        with self._lock:
            taken, self._lost = frozenset(self._lost), set()
            return taken
