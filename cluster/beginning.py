"""The first moments of a placement manager, in which it learns what its predecessor's readers go on with.

Until everybody alive had time to call, it answers nobody and moves nothing: half knowledge would flip aliases back and
forth, and a table with few names in it is worse than the one the readers have.
"""

from __future__ import annotations

from cluster.table import PlacementTable, ReaderReport


class Beginning:
    """Not thread-safe: one caller at a time.

    Args:
        until_s: by the manager's clock: whoever is alive has called by then.
    """

    def __init__(self, until_s: float) -> None:
        self._until_s = until_s
        self._has_old_readers = False
        self.recalled: PlacementTable | None = None
        """The newest table that a reader had from a predecessor."""

    def hear(self, reader: ReaderReport) -> None:
        self._has_old_readers |= reader.epoch > 0
        table = reader.table
        if table is not None and (self.recalled is None or table.epoch > self.recalled.epoch):
            self.recalled = table

    def is_over(self, now_s: float, *, has_registry: bool) -> bool:
        """Enough is known: from the registry, or while that is away from a reader, unless nobody has ever known any."""
        if now_s < self._until_s:
            return False
        return has_registry or self.recalled is not None or not self._has_old_readers
