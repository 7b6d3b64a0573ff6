"""A reader's view of the placement table: the last good one. Epochs only grow; the view knows how old it is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from cluster.table import DemandSample, PlacementTable, ReaderReport, TableUpdate
from storage.identity import AdapterVersion


class TableView:
    """Shared by the threads of one process: a poller offers updates, routers and the ingress read `table`.

    Args:
        clock: seconds; only differences matter.
        ttl_s: a table heard of longer ago tells a new manager nothing: its reader has asked the registry since.
    """

    def __init__(self, clock: Callable[[], float], ttl_s: float = math.inf) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._table = PlacementTable()
        self._author = 0
        self._residents_stamp = 0
        self._heard_s = -math.inf
        self._is_asked = False
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
        """Take an update unless it is older than what is held, or of another table. True if it was taken."""
        with self._lock:
            self._is_asked = update.asks_table
            if update.epoch == 0 or update.epoch < self._table.epoch:
                return False
            is_mine = (update.since, update.author) == (self._table.epoch, self._author)
            if update.since and not is_mine:
                return False
            self._table = update.applied_to(self._table)
            self._author, self._residents_stamp = update.author, update.residents_stamp
            self._heard_s = self._clock()
            return True

    def record(self, version: AdapterVersion, work: float) -> None:
        """Count one request for `version`, to be reported with the next poll."""
        with self._lock:
            self._count(version, DemandSample(1, work))

    def record_lost(self, replica_id: str) -> None:
        """A router found this replica dead; to be reported with the next poll."""
        with self._lock:
            self._lost.add(replica_id)

    def take_report(self) -> ReaderReport:
        """What to ask the manager with, and what was recorded since the last call."""
        with self._lock:
            demand, self._demand = self._demand, {}
            lost, self._lost = frozenset(self._lost), set()
            may_tell = self._is_asked and self.age_s <= self._ttl_s
            return ReaderReport(
                epoch=self._table.epoch,
                author=self._author,
                residents_stamp=self._residents_stamp,
                demand=demand,
                lost=lost,
                table=self._table if may_tell else None,
            )

    def give_back(self, report: ReaderReport) -> None:
        """The report reached nobody: what it says was recorded goes with the next one."""
        with self._lock:
            self._lost |= report.lost
            for version, sample in report.demand.items():
                self._count(version, sample)

    def _count(self, version: AdapterVersion, sample: DemandSample) -> None:
        before = self._demand.get(version, DemandSample(0, 0.0))
        self._demand[version] = DemandSample(
            before.requests + sample.requests, before.work + sample.work
        )
