"""What one router knows of one replica: its own requests there, and what the table says of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.table import ReplicaLoad

EVENNESS = 100.0
"""A slot kept busy over the memory weighs so many slots busy now: what is busy now is mostly chance."""
USUAL_LOAD_S = 0.1
"""Until a replica has loaded anything."""
OTHERS_SHARE = 0.3
"""Of what a poll says of other routers' requests, taken into the running mean."""


@dataclass(slots=True)
class KnownReplica:
    """What this router knows of one replica. One the table does not list is never free: it begins, or has ended."""

    under_way: int = 0  # its own requests there
    outstanding: float = 0.0  # their work
    recent: float = 0.0  # work it assigned lately, fading; of what has ended, as long as it took
    others: float = 0.0  # requests of other routers there, as a running mean
    others_work: float = 0.0
    slots: float = 0.0
    load_s: float = USUAL_LOAD_S
    is_listed: bool = False

    busy: tuple[bool, bool, float, float] = (True, True, 0.0, 0.0)
    """What replicas are compared by, the least first, kept up by `weigh`: whether a slot is free; with one, the slots
    busy now and over the memory, else the requests for each slot; then work.
    """

    @property
    def is_free(self) -> bool:
        return self.is_listed and self.under_way + self.others < self.slots

    def weigh(self, slots_per_work: float) -> None:
        """To be called after every change.

        Args:
            slots_per_work: kept busy on average by one unit of `recent`.
        """
        work = self.recent + max(0.0, self.others_work)
        busy = self.under_way + self.others
        if self.is_free:
            busy += EVENNESS * slots_per_work * work
        elif self.slots:
            # Who has just come has no memory, and is not to queue what others would start sooner.
            busy /= self.slots
        self.busy = (not self.is_listed, not self.is_free, busy, work)

    def start(self, work: float) -> None:
        self.under_way += 1
        self.outstanding += work
        self.recent += work

    def end(self, work: float) -> None:
        self.under_way -= 1
        self.outstanding -= work

    def hear(self, load: ReplicaLoad) -> None:
        """Take what a new view of the table says."""
        others = load.num_running + load.num_waiting - self.under_way
        others_work = load.work - self.outstanding
        if self.is_listed:
            self.others += OTHERS_SHARE * (others - self.others)
            self.others_work += OTHERS_SHARE * (others_work - self.others_work)
        else:  # the table may not have heard yet of what is under way
            self.others, self.others_work = max(0.0, others), max(0.0, others_work)
        self.slots = load.slots or math.inf
        self.load_s = load.load_s or USUAL_LOAD_S
        self.is_listed = True
