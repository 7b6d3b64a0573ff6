"""In which order a request tries the replicas: from the table, and from what this router knows of its own requests.

The table is up to a second old, and much changes in a second. So a router counts what it has under way at each replica
itself, and takes from the table only what it cannot know: who has which adapter, and how much others send.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cluster.failing_replicas import FailingReplicas, Outcome
from cluster.known_replica import KnownReplica
from cluster.rendezvous import Rankings
from cluster.table import PlacementTable
from storage.identity import AdapterVersion

MEMORY_S = 10.0
"""Half-life of the work of a replica, which holders share out evenly."""
SAMPLED_HOLDERS = 4
LOAD_DREAD = 9.5
"""A second copy of an adapter costs this times the seconds of its load, for it evicts another that will be missed.
Whoever found all who have it full since the last view shares the cost."""
COMING_S = 1.5
"""A replica that was sent a cold adapter counts as having it, until the table must have heard."""
TURN_SHARE = 0.02
"""Of a request that ends, taken into the running means of seconds and work."""
USUAL_TURN_S = 0.2
"""Seconds a request stays at a replica, until this router has seen some."""
MAX_UNDER_WAY = 10_000
LONGEST_TURN_S = MEMORY_S / math.log(2)
"""What a request is charged with at most, when it ends: a longer one's first seconds would have faded by then."""


@dataclass(slots=True)
class _UnderWay:
    replica_id: str
    work: float
    since_s: float


@dataclass(slots=True)
class _Places:
    """Where a version is, by one view of the table."""

    ready: list[str]  # holders that have it
    lucky: list[str]  # others that have it
    loading: list[str]  # holders that do not have it yet


class Routing:
    """One router's decisions. One thread or event loop.

    Args:
        clock: seconds; only differences matter.
        rng: what holders are sampled with, so that many routers do not all choose the same.
    """

    def __init__(self, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        self._clock = clock
        self._random = (rng or random.Random()).random
        self._replicas: dict[str, KnownReplica] = {}
        self._under_way: dict[str, _UnderWay] = {}
        self._turned_away: dict[str, None] = {}  # requests to be sent again, in order
        self._failing = FailingReplicas(clock)
        self._rankings = Rankings()
        self._places: dict[AdapterVersion, _Places] = {}
        self._coming: dict[AdapterVersion, tuple[str, float]] = {}
        self._pressed: dict[AdapterVersion, int] = {}  # requests that found all busy in this view
        self._turn_s = USUAL_TURN_S
        self._turn_work = 0.0  # of the requests that took so long; 0 before the first
        self._slots_per_work = 0.0
        self._table = PlacementTable()
        self._noticed_s = clock()

    def order(
        self,
        version: AdapterVersion | None,
        candidates: Collection[str],
        table: PlacementTable,
    ) -> list[str]:
        """All candidates, the best first and failing ones last; never empty unless `candidates` is.

        Args:
            version: the request's adapter; None for the base model, which every replica has.
            candidates: replica ids that may be tried; the table may know fewer or more.
        """
        best = self.best(version, candidates, table)
        sound = self._failing.sound(candidates)
        if version is None:
            by_load = sorted(candidates, key=lambda r: (self._busy(r), r))
            tried = list(dict.fromkeys((*best, *by_load)))
        else:
            places = self._where(version)
            others = sorted(self._rankings.of(version, sound), key=self._busy)
            by_place = (*best, *places.ready, *places.lucky, *places.loading, *others, *candidates)
            tried = [r for r in dict.fromkeys(by_place) if r in candidates]
        return tried if sound is candidates else sorted(tried, key=lambda r: r not in sound)

    def best(
        self, version: AdapterVersion | None, candidates: Collection[str], table: PlacementTable
    ) -> list[str]:
        """The candidate `order` begins with; nobody if there are none."""
        if table is not self._table:
            self._notice(table)
        candidates = self._failing.sound(candidates)
        if version is None:
            return [min(candidates, key=lambda r: (self._busy(r), r))] if candidates else []
        places = self._where(version)
        if len(places.ready) > SAMPLED_HOLDERS:
            best = self._least_busy_of_some(places.ready)
            if best in candidates and self._is_free(best):
                return [best]
        ready = [r for r in places.ready if r in candidates]
        having = ready + [r for r in places.lucky if r in candidates]
        if version in self._coming and self._coming[version][0] in candidates:
            having.append(self._coming[version][0])
        for group in (ready, having):
            if group:
                best = min(group, key=self._busy)
                if self._is_free(best):
                    return [best]
        return self._cheapest(version, having, places, candidates)

    def choose(self, request_id: str, replica_id: str, work: float) -> None:
        """The request goes to this replica, and no longer where it was to go before.

        To be told at once, not when the replica has accepted: requests of the same moment must see each other.
        """
        self.give_up(request_id)
        known = self._replicas.setdefault(replica_id, KnownReplica())
        known.start(work)
        known.weigh(self._slots_per_work)
        self._failing.send(replica_id)
        self._under_way[request_id] = _UnderWay(replica_id, work, self._clock())
        if len(self._under_way) > MAX_UNDER_WAY:  # nobody said how the oldest ended
            self.give_up(next(iter(self._under_way)))

    def is_chosen(self, request_id: str) -> bool:
        """Whether the request was sent to a replica and has not ended."""
        return request_id in self._under_way or request_id in self._turned_away

    def hear(self, replica_id: str, outcome: Outcome) -> None:
        """What became of a request, before or after it has ended here. One that failed is charged what most take."""
        self._failing.hear(replica_id, outcome)
        if outcome is Outcome.FAILED and replica_id in self._replicas:
            known = self._replicas[replica_id]
            known.recent += self._turn_work or 1.0
            known.weigh(self._slots_per_work)

    def finish(self, request_id: str) -> None:
        """The request has ended where it went: what it took is known now, and replaces what it was taken for."""
        ended = self._leave(request_id)
        if ended is None:
            return
        took_s = min(self._clock() - ended.since_s, LONGEST_TURN_S)
        turn_work = self._turn_work or ended.work
        if not self._failing.is_failing(ended.replica_id):
            self._turn_s += TURN_SHARE * (took_s - self._turn_s)
            self._turn_work = turn_work + TURN_SHARE * (ended.work - turn_work)
        took_work = took_s / self._turn_s * self._turn_work if self._turn_s > 0 else 0.0
        known = self._replicas[ended.replica_id]
        known.recent = max(0.0, known.recent + took_work - ended.work)
        known.weigh(self._slots_per_work)

    def reject(self, request_id: str) -> None:
        """A replica turned the request away: until it is sent again its work counts nowhere."""
        if request_id in self._under_way:
            self.give_up(request_id)
            self._turned_away[request_id] = None
            if len(self._turned_away) > MAX_UNDER_WAY:
                del self._turned_away[next(iter(self._turned_away))]

    def give_up(self, request_id: str) -> None:
        """The request was not served where it went: its work does not count there."""
        ended = self._leave(request_id)
        if ended is not None:
            known = self._replicas[ended.replica_id]
            known.recent = max(0.0, known.recent - ended.work)
            known.weigh(self._slots_per_work)

    def _leave(self, request_id: str) -> _UnderWay | None:
        self._turned_away.pop(request_id, None)
        ended = self._under_way.pop(request_id, None)
        if ended is not None:
            known = self._replicas[ended.replica_id]
            known.end(ended.work)
            known.weigh(self._slots_per_work)
        return ended

    # What the table says.

    def _notice(self, table: PlacementTable) -> None:
        """A new view: let old work fade, and learn how many requests are from others."""
        now_s = self._clock()
        fading = 0.5 ** ((now_s - self._noticed_s) / MEMORY_S)
        for known in self._replicas.values():
            known.recent *= fading
        if table.replicas is not self._table.replicas:
            for replica_id in self._replicas.keys() - table.replicas.keys():
                self._replicas[replica_id].is_listed = False
                if not self._replicas[replica_id].under_way:
                    del self._replicas[replica_id]
            for replica_id, load in table.replicas.items():
                self._replicas.setdefault(replica_id, KnownReplica()).hear(load)
        if self._turn_work > 0:
            self._slots_per_work = self._turn_s / self._turn_work * math.log(2) / MEMORY_S
        for known in self._replicas.values():
            known.weigh(self._slots_per_work)
        self._coming = {v: sent for v, sent in self._coming.items() if now_s - sent[1] < COMING_S}
        self._places.clear()
        self._pressed.clear()
        self._table, self._noticed_s = table, now_s

    def _where(self, version: AdapterVersion) -> _Places:
        places = self._places.get(version)
        if places is None:
            holders = self._table.holders.get(version, ())
            residents = self._table.residents.get(version, ())
            places = self._places[version] = _Places(
                ready=[r for r in holders if r in residents],
                lucky=[r for r in residents if r not in holders],
                loading=[r for r in holders if r not in residents],
            )
        return places

    # The choice.

    def _busy(self, replica_id: str) -> tuple[bool, bool, float, float]:
        return self._replicas.get(replica_id, _NOBODY).busy

    def _is_free(self, replica_id: str) -> bool:
        return self._replicas.get(replica_id, _NOBODY).is_free

    def _least_busy_of_some(self, replica_ids: list[str]) -> str:
        count = len(replica_ids)
        sampled = [replica_ids[int(self._random() * count)] for _ in range(SAMPLED_HOLDERS)]
        return min(sampled, key=self._busy)

    def _cheapest(
        self,
        version: AdapterVersion,
        having: list[str],
        places: _Places,
        candidates: Collection[str],
    ) -> list[str]:
        """The least cost of waiting and loading, among those who have it and the least busy of all others.

        So cold adapters even out what homes leave uneven. A holder that does not have it has no claim, for the plan
        goes where an adapter is; of replicas that have done nothing lately holders come first, then the adapter's own
        ranking, in which routers that cannot hear each other agree.
        """
        costs = {r: self._wait_s(r) for r in having}
        loading = [r for r in places.loading if r in candidates]
        ranked = self._rankings.of(version, candidates)
        # One load serves all who found everybody full: a crowd spreads at once, a chance meeting waits.
        pressed = self._pressed[version] = self._pressed.get(version, 0) + 1
        if cold := [r for r in (*loading, *ranked) if r not in costs]:
            new = min(cold, key=self._busy)
            costs[new] = self._wait_s(new) + LOAD_DREAD * self._load_s(new) / pressed
        if not costs:
            return []
        best = min(costs, key=costs.__getitem__)
        if best not in having:
            self._coming[version] = (best, self._clock())
        return [best]

    def _wait_s(self, replica_id: str) -> float:
        """Seconds until the request would get a slot."""
        known = self._replicas.get(replica_id, _NOBODY)
        if not known.is_listed:
            return math.inf
        before_it = known.under_way + known.others + 1 - known.slots
        return max(0.0, before_it) * self._turn_s / known.slots

    def _load_s(self, replica_id: str) -> float:
        return self._replicas.get(replica_id, _NOBODY).load_s


_NOBODY = KnownReplica()
