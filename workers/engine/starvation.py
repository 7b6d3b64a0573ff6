"""When the bank is full: whose new work waits, so that rows free up for a request that has waited too long."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from storage.identity import AdapterVersion


class StarvationRule:
    """Closes resident adapters to new work, one at a time, the one with the least work left first.

    Requests that hold a closed adapter already are finished, not stopped: the wait is bounded by what they still take.
    A closed adapter loses its pin too, or a replica full of pinned adapters could never answer for another one.
    """

    def __init__(self) -> None:
        self._closed: set[AdapterVersion] = set()

    @property
    def closed(self) -> frozenset[AdapterVersion]:
        """Adapters that get no new work now."""
        return frozenset(self._closed)

    def update(
        self,
        *,
        starving: Collection[AdapterVersion],
        is_trying: bool,
        work_left: Mapping[AdapterVersion, float],
        pinned: Collection[AdapterVersion],
    ) -> None:
        """Decide again; called once per step.

        Args:
            starving: adapters without room whose oldest request has waited too long.
            is_trying: one of them is being loaded at the moment, so the room may be there already.
            work_left: rank-weighted tokens left by resident adapter; 0 when idle.
            pinned: adapters to close last.
        """
        if not starving:
            self._closed.clear()
            return
        # One that is evicted has given its room; closed for longer, its own requests would never be looked at.
        self._closed &= work_left.keys()
        if is_trying or any(work_left.get(version) for version in self._closed):
            return
        candidates = [version for version in work_left if version not in self._closed]
        if candidates:
            self._closed.add(
                min(candidates, key=lambda version: (version in pinned, work_left[version]))
            )
