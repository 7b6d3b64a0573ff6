"""Workloads: who asks for which adapter, when, and for how long; and the best hit rate anyone could have.

Every trace is drawn from its seed before the simulation begins, so all policies are asked the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.identity import AdapterVersion, sha256_hex

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MEAN_SERVICE_S = 0.14
SERVICE_SIGMA = 0.5  # of the logarithm of the service time
LOAD_S = 0.1
MAX_RANK = 64
EASY_START_S = 30
"""Banks are empty at first: so many seconds come at half the rate, for nobody opens a cold cluster to everyone."""
DRIFT_SWAPS_PER_S = 5  # in 10,000 adapters
CROWD_SHARE = 0.1
CROWD_RANK = 0.9  # of all adapters by popularity, before its crowd comes
GLOBAL_DWELL_S = 10.0
GLOBAL_SWING = 0.5
MOST_UTILISATION = 0.95
"""A burst of all traffic is half as much again, but never more than the replicas can do."""
ADAPTER_BURST = 3.0
ADAPTER_ON_S, ADAPTER_OFF_S = 60.0, 180.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The machines, and what is registered."""

    adapters: int = 10_000
    replicas: int = 64
    slots: int = 8
    rows: int = 100
    routers: int = 1  # processes that route: one ingress, as deployed
    is_mixed: bool = False  # ranks 1…64 log-uniform and eight times the rows, instead of rank 1

    @property
    def bank_rows(self) -> int:
        return self.rows * 8 if self.is_mixed else self.rows


@dataclass(frozen=True, slots=True)
class Span:
    """How long a run is, from when it is judged, and when a crowd comes."""

    duration_s: int = 240
    warmup_s: int = 90
    crowd_s: int = 150
    window_s: int = 30  # over which imbalance is taken


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    versions: tuple[AdapterVersion, ...]
    ranks: tuple[int, ...]
    times: Floats
    adapters: Integers
    services: Floats
    best: Floats  # hit rate, for each second, of banks filled with what is truly asked for most per row
    crowd: int | None  # the adapter a crowd comes for


@dataclass(frozen=True, slots=True)
class _World:
    zipf: Floats  # popularity of each adapter, in random order
    order: Integers  # adapters by popularity
    utilisation: float
    span: Span
    rng: np.random.Generator


Seconds = Iterator[tuple[Floats, float]]
"""Popularity of each adapter, and the rate over its mean, second by second."""


def _uniform(world: _World) -> Seconds:
    even = np.full(len(world.zipf), 1.0 / len(world.zipf))
    while True:
        yield even, 1.0


def _zipf(world: _World) -> Seconds:
    while True:
        yield world.zipf, 1.0


def _drift(world: _World) -> Seconds:
    """Each second some random pairs of adapters swap their popularity."""
    popularity, count = world.zipf, len(world.zipf)
    while True:
        popularity = popularity.copy()
        for pair in world.rng.integers(count, size=(round(DRIFT_SWAPS_PER_S * count / 10_000), 2)):
            popularity[pair] = popularity[pair[::-1]]
        yield popularity, 1.0


def _flash(world: _World) -> Seconds:
    crowded = world.zipf * (1 - CROWD_SHARE)
    crowded[_crowd_of(world)] += CROWD_SHARE
    for _ in range(world.span.crowd_s):
        yield world.zipf, 1.0
    while True:
        yield crowded, 1.0


def _mmpp_global(world: _World) -> Seconds:
    swing = min(GLOBAL_SWING, MOST_UTILISATION / world.utilisation - 1)
    is_high = False
    while True:
        is_high ^= bool(world.rng.random() < 1 / GLOBAL_DWELL_S)
        yield world.zipf, 1 + swing if is_high else 1 - swing


def _mmpp_adapter(world: _World) -> Seconds:
    part_on = ADAPTER_ON_S / (ADAPTER_ON_S + ADAPTER_OFF_S)
    calm = (1 - part_on * ADAPTER_BURST) / (1 - part_on)
    on = world.rng.random(len(world.zipf)) < part_on
    while True:
        leaving = np.where(on, 1 / ADAPTER_ON_S, 1 / ADAPTER_OFF_S)
        on = on ^ (world.rng.random(len(on)) < leaving)
        weights = world.zipf * np.where(on, ADAPTER_BURST, calm)
        yield weights / weights.sum(), 1.0


WORKLOADS: dict[str, Callable[[_World], Seconds]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "drift": _drift,
    "flash": _flash,
    "mmpp-global": _mmpp_global,
    "mmpp-adapter": _mmpp_adapter,
}


def _crowd_of(world: _World) -> int:
    return int(world.order[int(CROWD_RANK * len(world.order))])


def best_hit_rate(popularity: Floats, ranks: Integers, rows: int) -> float:
    """Of so many rows, all filled with the adapters asked for most per row."""
    order = np.argsort(-popularity / ranks, kind="stable")
    filled = np.cumsum(ranks[order])
    return float(popularity[order][filled <= rows].sum())


def draw(
    workload: str, fleet: Fleet, utilisation: float, seed: int, span: Span | None = None
) -> Trace:
    """One trace. Its mean rate keeps the slots busy for `utilisation` of their time at the best hit rate."""
    span = span or Span()
    rng = np.random.default_rng(seed)
    count = fleet.adapters
    ranks = np.ones(count, dtype=np.int64)
    if fleet.is_mixed:
        ranks = np.rint(np.exp(rng.uniform(0, math.log(MAX_RANK), count))).astype(np.int64)
    order, shares = rng.permutation(count), 1.0 / np.arange(1, count + 1)
    zipf = np.empty(count)
    zipf[order] = shares / shares.sum()
    world = _World(zipf, order, utilisation, span, rng)
    states = WORKLOADS[workload](world)
    seconds = [next(states) for _ in range(span.duration_s)]

    rows, best, rates = fleet.replicas * fleet.bank_rows, np.empty(len(seconds)), {}
    for second, (popularity, _) in enumerate(seconds):
        if id(popularity) not in rates:
            rates[id(popularity)] = best_hit_rate(popularity, ranks, rows)
        best[second] = rates[id(popularity)]
    busy_s = MEAN_SERVICE_S + (1 - best.mean()) * LOAD_S
    rate = utilisation * fleet.replicas * fleet.slots / busy_s
    times, adapters = [], []
    for second, (popularity, factor) in enumerate(seconds):
        easy = 0.5 if second < EASY_START_S else 1.0
        arrivals = rng.poisson(rate * factor * easy)
        edges = np.cumsum(popularity)
        times.append(second + np.sort(rng.random(arrivals)))
        adapters.append(np.searchsorted(edges, rng.random(arrivals) * edges[-1], side="right"))
    arrived = np.concatenate(times)
    log_mean = math.log(MEAN_SERVICE_S) - SERVICE_SIGMA**2 / 2
    return Trace(
        versions=tuple(AdapterVersion(sha256_hex(f"adapter {i}".encode())) for i in range(count)),
        ranks=tuple(ranks.tolist()),
        times=arrived,
        adapters=np.concatenate(adapters),
        services=rng.lognormal(log_mean, SERVICE_SIGMA, len(arrived)),
        best=best,
        crowd=_crowd_of(world) if workload == "flash" else None,
    )
