"""Ours and its rivals in one form: who chooses a replica, whether the manager plans, and who leaves a full bank."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from benchmarks.placement.replica import SimulatedReplica
from cluster.rendezvous import Rankings
from cluster.routing import Routing
from cluster.table import PlacementTable
from storage.identity import AdapterVersion
from workers.bank.eviction import readiness_to_leave

BOUND = 1.25
"""Bounded-load consistent hashing: a replica takes at most this times the mean (ε = 1/4)."""
BOUND_HALFLIFE_S = 10.0
LEAST_LOADED_HALFLIFE_S = 0.5  # as old as the table
ACCEPTED_PER_SLOT = 2
"""Ray's replicas accept so many requests for each slot (`max_ongoing_requests`)."""

Clock = Callable[[], float]
Replicas = Mapping[str, SimulatedReplica]


class Router(Protocol):
    """What the simulation asks of one router process: see `cluster.routing.Routing`."""

    def best(
        self, version: AdapterVersion | None, candidates: Collection[str], table: PlacementTable
    ) -> list[str]: ...

    def choose(self, request_id: str, replica_id: str, work: float) -> None: ...

    def finish(self, request_id: str) -> None: ...

    def give_up(self, request_id: str) -> None: ...


def least_recently_used(rows: int, idle_s: float) -> float:
    """Who leaves a full bank first by Ray Serve's rule (`_ModelMultiplexWrapper`, Ray 2.60): size does not matter."""
    return idle_s


@dataclass(frozen=True, slots=True)
class Policy:
    """`to_leave` is that of `SimulatedReplica`; among adapters of rank 1 both kinds are the same."""

    name: str
    router: Callable[[Clock, random.Random, Replicas], Router]
    is_planned: bool = False
    to_leave: Callable[[int, float], float] = least_recently_used


class _Rival:
    """Remembers the work it assigned, halving every half-life; what becomes of a request is nothing to it."""

    def __init__(self, clock: Clock, halflife_s: float) -> None:
        self._clock = clock
        self._halflife_s = halflife_s
        self._assigned: dict[str, float] = {}
        self._faded_s = clock()

    def choose(self, request_id: str, replica_id: str, work: float) -> None:
        self._assigned[replica_id] = self._assigned.get(replica_id, 0.0) + work

    def finish(self, request_id: str) -> None:
        pass

    def give_up(self, request_id: str) -> None:
        pass

    def _fade(self) -> None:
        elapsed_s = self._clock() - self._faded_s
        if elapsed_s > self._halflife_s / 50:
            factor = 0.5 ** (elapsed_s / self._halflife_s)
            self._assigned = {r: work * factor for r, work in self._assigned.items()}
            self._faded_s += elapsed_s


class LeastLoaded(_Rival):
    """The replica with the least work: as last reported, and assigned since. Adapters do not matter."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, LEAST_LOADED_HALFLIFE_S)

    def best(
        self, version: AdapterVersion | None, candidates: Collection[str], table: PlacementTable
    ) -> list[str]:
        self._fade()

        def busy(replica_id: str) -> float:
            load = table.replicas.get(replica_id)
            return (load.work if load else 0.0) + self._assigned.get(replica_id, 0.0)

        return [min(candidates, key=busy)]


class BoundedHashing(_Rival):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018): the first replica of the
    adapter's own ranking whose assigned work is within the bound.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, BOUND_HALFLIFE_S)
        self._rankings = Rankings()

    def best(
        self, version: AdapterVersion | None, candidates: Collection[str], table: PlacementTable
    ) -> list[str]:
        assert version is not None
        self._fade()
        bound = BOUND * (sum(self._assigned.values()) / len(candidates) + 1)
        ranking = self._rankings.of(version, candidates)
        light = (r for r in ranking if self._assigned.get(r, 0.0) <= bound)
        return [next(light, ranking[0])]


class MultiplexRule:
    """Ray Serve's (`MultiplexMixin` and `PowerOfTwoChoicesRequestRouter`, Ray 2.60): of the replicas that have the
    model two at random, the shorter queue; if neither accepts, two of those with the fewest models; then any two.

    It is given more than it has in Ray: queue lengths are true at the moment of asking, and no retry takes time.
    """

    def __init__(self, rng: random.Random, replicas: Replicas) -> None:
        self._rng = rng
        self._replicas = replicas

    def best(
        self, version: AdapterVersion | None, candidates: Collection[str], table: PlacementTable
    ) -> list[str]:
        assert version is not None
        having = [r for r in table.residents.get(version, ()) if r in candidates]
        for group in (having, self._fewest(candidates), list(candidates)):
            two = group if len(group) < 3 else self._rng.sample(group, 2)
            accepting = [r for r in two if self._accepts(self._replicas[r])]
            if accepting:
                return [min(accepting, key=self._queue)]
        return [min(having or candidates, key=self._queue)]

    def choose(self, request_id: str, replica_id: str, work: float) -> None:
        pass

    def finish(self, request_id: str) -> None:
        pass

    def give_up(self, request_id: str) -> None:
        pass

    def _queue(self, replica_id: str) -> int:
        return self._replicas[replica_id].num_ongoing

    def _accepts(self, replica: SimulatedReplica) -> bool:
        return replica.num_ongoing < ACCEPTED_PER_SLOT * replica.slots

    def _fewest(self, candidates: Collection[str]) -> list[str]:
        counts = {r: len(self._replicas[r].bank) for r in candidates}
        least = min(counts.values())
        return [r for r, count in counts.items() if count == least]


def _multiplexed(clock: Clock, rng: random.Random, replicas: Replicas) -> Router:
    return MultiplexRule(rng, replicas)


OURS = Policy(
    "ours",
    lambda clock, rng, replicas: Routing(clock, rng),
    is_planned=True,
    to_leave=readiness_to_leave,
)
RAYS_RULE = Policy("multiplex rule", _multiplexed)
RAYS_RULE_OUR_BANK = Policy(
    "multiplex rule with our bank", _multiplexed, to_leave=readiness_to_leave
)
"""What Ray's rule would be with a bank that weighs size: how much of the difference is the bank's, and how much is
placement's. Nobody can run it, so it is told and not judged."""
RIVALS = (
    Policy("least loaded", lambda clock, rng, replicas: LeastLoaded(clock)),
    Policy("bounded hashing", lambda clock, rng, replicas: BoundedHashing(clock)),
    RAYS_RULE,
)
