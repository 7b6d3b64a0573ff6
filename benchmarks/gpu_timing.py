"""How long things take on a GPU: captured in graphs, so that the host is not measured, and in turns.

A side is a list of calls that do the same work on different data: together they touch more memory than the L2 cache
holds, as the layers of a model do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
CACHE_BYTES = 4 * (60 << 20)
"""Data of a side that no round finds in the cache of the round before."""


def copies_for(num_bytes: int) -> int:
    """How many calls of `num_bytes` each a side needs."""
    return max(2, -(-CACHE_BYTES // num_bytes))


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of one call. It runs the call twice first, which compiles what it needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def seconds_of(call: Call) -> float:
    """Of one call on the device, waiting for it."""
    began, ended = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def in_turns(sides: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; who begins alternates. The first round is thrown away."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        order = list(sides.items())
        for name, call in order if number % 2 else reversed(order):
            seconds = seconds_of(call)
            if number:
                taken[name].append(seconds)
    return taken


def replays(sides: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, tuple[float, ...]]:
    """Seconds of one call of each side in every round, all of a side's calls replayed in one graph."""

    def graph_of(calls: Sequence[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        return capture(run).replay

    taken = in_turns({name: graph_of(calls) for name, calls in sides.items()}, rounds)
    return {
        name: tuple(second / len(sides[name]) for second in seconds)
        for name, seconds in taken.items()
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    return tuple(one / other for one, other in zip(above, below, strict=True))
