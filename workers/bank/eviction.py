"""Who leaves a full bank first. Pure: the bank and the placement simulator ask the same question."""

from __future__ import annotations


def readiness_to_leave(rows: int, idle: float) -> float:
    """The more, the sooner an adapter that nobody uses makes room: its rows times how long it has been idle.

    An adapter idle for so long is asked for about once in as long, so this is rows paid per request served. Among
    adapters of one size it is least recently used first.

    Args:
        rows: of its largest projection.
        idle: since its last use, in seconds or in uses of others.
    """
    return max(1, rows) * idle
