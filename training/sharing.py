"""Which worker trains which adapters. Pure: the same question has the same answer on every worker."""

from __future__ import annotations

from collections.abc import Mapping

Shares = tuple[tuple[str, ...], ...]
"""`shares[w]` are the adapters of worker w, by name."""

_WORTH_MOVING = 0.8
"""Taking up another share costs a worker seconds: the slowest must be left with less than this part of its work."""


def share_out(costs: Mapping[str, float], num_workers: int) -> Shares:
    """Longest first, each to the worker with least to do. Workers beyond the number of adapters have none."""
    shares: list[list[str]] = [[] for _ in range(num_workers)]
    load = [0.0] * num_workers
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        worker = load.index(min(load))
        shares[worker].append(name)
        load[worker] += costs[name]
    return tuple(tuple(share) for share in shares)


def share_again(shares: Shares, costs_left: Mapping[str, float], num_workers: int) -> Shares:
    """The shares to go on with: the old ones, unless there are more or fewer workers now, or others had to wait long
    for the one with most left to do.

    Args:
        costs_left: of the adapters that are not over.
    """
    fresh = share_out(costs_left, num_workers)
    if len(shares) != num_workers or _longest(fresh, costs_left) < _WORTH_MOVING * _longest(
        shares, costs_left
    ):
        return fresh
    return shares


def _longest(shares: Shares, costs: Mapping[str, float]) -> float:
    return max(sum(costs.get(name, 0.0) for name in share) for share in shares)
