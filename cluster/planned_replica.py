"""The books of a plan in the making: what a replica has so far, and what may still be loaded and moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.placement import ReplicaSpace, WantedAdapter

MOVES_PER_TICK = 4
SPARE_ADAPTERS = 10
"""Of mean size, for which a plan leaves room: adapters that it does not hold need rows too while they are in use."""
MOST_SPARE = 0.25
"""Of a bank, however large they are."""


@dataclass(slots=True)
class Budget:
    """What plans may still spend. Below 1 but above 0 is enough for one more, which the next refill makes good."""

    loads: float
    moves: float = MOVES_PER_TICK

    def refill(self, ticks: float, max_loads: int) -> None:
        """As much as belongs to a part of a tick, or to several, and never more than one tick's worth in all."""
        self.loads = min(max_loads, self.loads + ticks * max_loads)
        self.moves = min(MOVES_PER_TICK, self.moves + ticks * MOVES_PER_TICK)


class PlannedReplica:
    """One replica in a run: its space, and what is planned for it so far."""

    __slots__ = ("bytes_left", "load", "replica_id", "rows_left", "space", "used")

    def __init__(self, space: ReplicaSpace, planned_part: float, mean_rows: float) -> None:
        self.space = space
        self.replica_id = space.replica_id
        spare = min(SPARE_ADAPTERS * mean_rows, MOST_SPARE * space.rows)
        self.rows_left = int(min(space.rows * planned_part, space.rows - spare))
        self.bytes_left = math.inf if space.num_bytes is None else space.num_bytes
        self.used = 0
        self.load = 0.0

    def fits(self, item: WantedAdapter) -> bool:
        if item.version in self.space.unfit or item.num_bytes > self.bytes_left:
            return False
        if not self.used:  # an adapter larger than the planned part may have the bank to itself
            return item.rows <= self.space.rows
        return item.rows <= self.rows_left

    def most_left(self) -> int:
        """Rows of the largest item that may fit."""
        return self.rows_left if self.used else self.space.rows

    def is_light(self, item: WantedAdapter, bound: float) -> bool:
        return not self.load or self.load + item.share <= bound

    def take(self, item: WantedAdapter) -> None:
        self._change(item, 1)

    def drop(self, item: WantedAdapter) -> None:
        self._change(item, -1)

    def _change(self, item: WantedAdapter, sign: int) -> None:
        self.used += sign
        self.rows_left -= sign * item.rows
        self.bytes_left -= sign * item.num_bytes
        self.load = self.load + sign * item.share if self.used else 0.0
