"""What a manager remembers for whoever watches: replicas' last figures, also of those that left, and moves of the plan.

Decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from cluster.table import ReplicaReport
from storage.figures import FigureKey, Figures
from storage.identity import AdapterVersion

MANAGER = "placement manager"
"""The source of the manager's own figures, beside replica ids."""
_MAX_REPLICAS = 256


class ClusterFigures:
    """Not thread-safe.

    What a replica counted between the last scrape and its end is not lost: its last report stays until many others
    were heard.
    """

    def __init__(self) -> None:
        self._replicas: OrderedDict[str, Figures] = OrderedDict()
        self._holders: Mapping[AdapterVersion, tuple[str, ...]] = {}
        self._given = 0
        self._taken = 0

    def heard(self, report: ReplicaReport) -> None:
        self._replicas[report.replica_id] = report.figures
        self._replicas.move_to_end(report.replica_id)
        while len(self._replicas) > _MAX_REPLICAS:
            self._replicas.popitem(last=False)

    def planned(self, holders: Mapping[AdapterVersion, tuple[str, ...]]) -> None:
        """Count how the plan differs from the one before."""
        if holders is self._holders:
            return
        before, now = self._holders, holders
        self._holders = holders
        for version in {*before, *now}:
            had, has = before.get(version, ()), now.get(version, ())
            if had != has:
                self._given += len(set(has).difference(had))
                self._taken += len(set(had).difference(has))

    def read(self) -> dict[str, Figures]:
        """By source: replica ids, and `MANAGER`."""
        moves: dict[FigureKey, float] = {
            ("flora_placement_moves_total", ("given",)): float(self._given),
            ("flora_placement_moves_total", ("taken",)): float(self._taken),
        }
        return {**self._replicas, MANAGER: Figures(counters=moves)}
