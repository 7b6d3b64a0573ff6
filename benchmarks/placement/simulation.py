"""The simulation: arrivals, slots, heartbeats, polls and ticks on one clock that jumps from event to event.

The placement manager, its planner, the routers' views of the table and their routing are those of production.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count

from benchmarks.placement.policies import Policy, Router
from benchmarks.placement.replica import Request, SimulatedReplica
from benchmarks.placement.traces import LOAD_S, Fleet, Trace
from cluster.config import ClusterSettings
from cluster.manager import PlacementManager
from cluster.registry_word import RegistryWord
from cluster.table import AdapterFacts, ReplicaReport
from cluster.view import TableView

WORK = 1.0
"""Every request is as much work as any other, in the mean: a slot's time does not depend on the rank here."""
RETRY_S = 0.01
"""Until a router learns that the replica it chose is gone."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One replica dies, and an empty one comes in its place."""

    at_s: float
    back_s: float


@dataclass(slots=True)
class Record:
    """What happened: to each request by its index, and to the plan at each tick."""

    wait_s: list[float]  # from arrival to a slot
    load_s: list[float]  # that the slot waited for the adapter
    is_hit: list[bool]
    replica: list[int]  # −1: not started when the simulation ended
    prefetches: list[tuple[float, int]] = field(default_factory=list)  # when, how many
    holders: list[tuple[float, int]] = field(default_factory=list)  # when, how many placements


@dataclass(slots=True)
class _RouterProcess:
    routing: Router
    view: TableView


class Simulation:
    """One run of one trace under one policy."""

    def __init__(
        self,
        fleet: Fleet,
        trace: Trace,
        policy: Policy,
        seed: int,
        settings: ClusterSettings | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.now_s = 0.0
        self.replicas: dict[str, SimulatedReplica] = {}
        requests = len(trace.times)
        self.record = Record(
            [0.0] * requests, [0.0] * requests, [False] * requests, [-1] * requests
        )
        self._fleet, self._trace, self._policy = fleet, trace, policy
        self._settings = settings or ClusterSettings()
        self._rng = random.Random(seed)
        self._numbers = count()
        self._events: list[
            tuple[float, int, Callable[[], None] | None, SimulatedReplica | None, int]
        ] = []
        self._ranks = dict(zip(trace.versions, trace.ranks, strict=True))
        self._manager = PlacementManager(self._settings, "base", 1, lambda: self.now_s)
        self._manager.set_registry(
            RegistryWord(
                {("default", f"adapter-{i}", "latest"): v for i, v in enumerate(trace.versions)},
                {version: AdapterFacts(rank, rank) for version, rank in self._ranks.items()},
            )
        )
        self._routers = [self._router(seed * 101 + i) for i in range(fleet.routers)]
        self._senders = self._rng.choices(self._routers, k=requests)
        for index in range(fleet.replicas):
            self._add_replica(
                f"replica-{index:02}", self._rng.uniform(0, self._settings.heartbeat_s)
            )
        self._candidates = dict.fromkeys(self.replicas)
        for router in self._routers:
            self._every(self._settings.heartbeat_s, self._rng.random(), self._poll_of(router))
        if policy.is_planned:
            self._every(self._settings.tick_s, 2.0, self._tick)
        if loss is not None:
            self._at(loss.at_s, self._lose)
            self._at(loss.back_s, self._replace)

    def run(self) -> Record:
        """All arrivals; what is under way at the end is not waited for."""
        trace, events = self._trace, self._events
        arrivals = zip(
            trace.times.tolist(), trace.adapters.tolist(), trace.services.tolist(), strict=True
        )
        for index, (time_s, adapter, service_s) in enumerate(arrivals):
            while events and events[0][0] <= time_s:
                self._handle()
            self.now_s = time_s
            self._route(Request(index, trace.versions[adapter], service_s, time_s))
        return self.record

    def check_integrity(self) -> None:
        self._manager.check_integrity()
        for replica in self.replicas.values():
            replica.check_integrity()

    # Events.

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heappush(self._events, (time_s, next(self._numbers), action, None, 0))

    def _every(self, period_s: float, first_s: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self._at(self.now_s + period_s, again)

        self._at(first_s, again)

    def _handle(self) -> None:
        self.now_s, _, action, replica, index = heappop(self._events)
        if action is not None:
            action()
        elif replica is not None and replica.is_alive:
            replica.finish(index)
            self._senders[index].routing.finish(str(index))
            self._start_waiting(replica)

    # Requests.

    def _route(self, request: Request) -> None:
        router, request_id = self._senders[request.index], str(request.index)
        view, routing, version = router.view, router.routing, request.version
        replica_id = routing.best(version, self._candidates, view.table)[0]
        view.record(version, WORK)
        routing.choose(request_id, replica_id, WORK)
        replica = self.replicas[replica_id]
        if replica.can_start(version, self.now_s):
            self._start(replica, request)
        else:
            replica.queue.append(request)

    def _start(self, replica: SimulatedReplica, request: Request) -> None:
        index, record = request.index, self.record
        load_s = replica.start(request, self.now_s)
        record.wait_s[index] = self.now_s - request.arrived_s
        record.load_s[index] = load_s
        record.is_hit[index] = load_s == 0
        record.replica[index] = replica.number
        done_s = self.now_s + load_s + request.service_s
        heappush(self._events, (done_s, next(self._numbers), None, replica, index))
        if load_s:
            self._at(self.now_s + load_s, partial(self._start_waiting, replica))

    def _start_waiting(self, replica: SimulatedReplica) -> None:
        while (request := replica.next_startable(self.now_s)) is not None:
            self._start(replica, request)

    # Replicas.

    def _add_replica(self, replica_id: str, first_beat_s: float) -> None:
        number = len(self.replicas)
        if replica_id in self.replicas:
            number = self.replicas[replica_id].number
        replica = SimulatedReplica(
            replica_id,
            number,
            self._fleet.slots,
            self._fleet.bank_rows,
            self._ranks,
            self._policy.to_leave,
        )
        self.replicas[replica_id] = replica

        def beat() -> None:
            if replica.is_alive:
                self._heartbeat(replica)
                self._at(self.now_s + self._settings.heartbeat_s, beat)

        self._at(first_beat_s, beat)

    def _heartbeat(self, replica: SimulatedReplica) -> None:
        report = ReplicaReport(
            replica_id=replica.replica_id,
            rows=replica.rows,
            num_bytes=replica.rows,
            device=replica.resident(self.now_s),
            work=replica.num_ongoing * WORK,
            num_running=len(replica.running),
            num_waiting=len(replica.queue),
            slots=replica.slots,
            load_s=LOAD_S,
        )
        orders = self._manager.heartbeat(report)
        if self._policy.is_planned and orders is not None:
            loads = replica.obey(orders.wanted, orders.pinned, self.now_s)
            if loads:
                self.record.prefetches.append((self.now_s, loads))
                for ready_s in sorted(set(replica.bank.values())):
                    if ready_s > self.now_s:
                        self._at(ready_s, partial(self._start_waiting, replica))

    def _lose(self) -> None:
        """The router that finds it dead says so, as in production; its requests are sent again."""
        replica = next(iter(self.replicas.values()))
        replica.is_alive = False
        del self._candidates[replica.replica_id]
        for router in self._routers:
            router.view.record_lost(replica.replica_id)
        for request in (*replica.running.values(), *replica.queue):
            self._senders[request.index].routing.give_up(str(request.index))
            self._at(self.now_s + RETRY_S, partial(self._route, request))

    def _replace(self) -> None:
        replica_id = next(iter(self.replicas))
        self._add_replica(replica_id, self.now_s)
        self._candidates[replica_id] = None

    # The control plane.

    def _router(self, seed: int) -> _RouterProcess:
        def clock() -> float:
            return self.now_s

        routing = self._policy.router(clock, random.Random(seed), self.replicas)
        return _RouterProcess(routing, TableView(clock))

    def _poll_of(self, router: _RouterProcess) -> Callable[[], None]:
        def poll() -> None:
            router.view.offer(self._manager.poll(router.view.take_report()))
            if self._policy.is_planned and self._manager.wants_tick:
                self._tick()

        return poll

    def _tick(self) -> None:
        self._manager.tick()
        holders = self._manager.placement.holders
        self.record.holders.append((self.now_s, sum(map(len, holders.values()))))
