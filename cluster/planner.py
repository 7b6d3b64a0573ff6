"""What placement remembers between ticks: demand, how many holders each version has a right to, and the last plan.

Pure: time comes from the clock passed in. It knows nothing of aliases, epochs or heartbeats; the placement manager and
the simulator of `benchmarks/placement` drive the same planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.config import ClusterSettings
from cluster.demand import DemandRate, DemandTracker
from cluster.placement import Placement, ReplicaSpace, WantedAdapter
from cluster.placing import copies_wanted, place
from cluster.planned_replica import Budget
from cluster.rendezvous import Rankings
from cluster.table import AdapterFacts, DemandSample
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class Reservation:
    """A version to hold, and to load at once, though nobody or too few ask for it.

    `copies` and `work` are lower bounds on what its own demand gives it. A successor names the version it `replaces`:
    it is as wanted as that one, and goes where that one is.
    """

    version: AdapterVersion
    copies: int = 1
    work: float = 0.0  # rank-weighted tokens per second
    replaces: AdapterVersion | None = None


@dataclass(frozen=True, slots=True)
class _Copies:
    """How many holders a version has a right to; fewer only after wanting fewer for a while."""

    count: int
    below_since_s: float | None = None

    def next(self, count: int, now_s: float, patience_s: float) -> _Copies:
        if count >= self.count:
            return _Copies(count)
        since_s = now_s if self.below_since_s is None else self.below_since_s
        if now_s - since_s >= patience_s:
            return _Copies(count)
        return _Copies(self.count, since_s)


class PlacementPlanner:
    """Makes the plans. Not thread-safe: one caller at a time.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, settings: ClusterSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._demand = DemandTracker(settings.demand_halflife_s, clock)
        self._copies: dict[AdapterVersion, _Copies] = {}
        self._placement = Placement()
        self._rates: Mapping[AdapterVersion, float] = {}
        self._rankings = Rankings()
        self._budget = Budget(settings.max_loads_per_tick)
        self._refilled_s = clock()

    @property
    def placement(self) -> Placement:
        """The last plan."""
        return self._placement

    @property
    def demand(self) -> Mapping[AdapterVersion, float]:
        """Rank-weighted tokens per second of each version with demand, as the last plan saw it."""
        return self._rates

    def observe(self, demand: Mapping[AdapterVersion, DemandSample]) -> None:
        """Take one router's report of what it was asked for since its last one."""
        self._demand.observe(demand)

    def inherit(self, old: AdapterVersion, new: AdapterVersion, work_ratio: float) -> None:
        """From now on `new` is asked for what `old` was, and `old` for nothing.

        Args:
            work_ratio: the new version's work per token over the old one's.
        """
        self._demand.inherit(old, new, work_ratio)
        if old in self._copies:
            self._copies[new] = self._copies.pop(old)

    def plan(
        self,
        replicas: Iterable[ReplicaSpace],
        facts: Mapping[AdapterVersion, AdapterFacts],
        reserved: Iterable[Reservation] = (),
    ) -> Placement:
        """The plan from now on: for what is asked for among the versions in `facts`, and for what is `reserved`.

        It may be called as often as anything changes; cooldowns, loads and moves are by the second, not by the call.
        """
        spaces, reserved = list(replicas), list(reserved)
        rates = {v: rate for v, rate in self._demand.rates().items() if v in facts}
        self._rates = {version: rate.work for version, rate in rates.items()}
        self._count_copies(rates, len(spaces))
        wanted = {
            version: WantedAdapter(
                version,
                facts[version].rows,
                rate.work,
                self._copies[version].count,
                rate.requests,
                facts[version].num_bytes,
            )
            for version, rate in rates.items()
        }
        for item in reserved:
            wanted[item.version] = self._reserve(item, wanted, facts)
        previous = self._beside_predecessors(reserved)
        self._placement = place(
            wanted.values(), spaces, previous, self._settings, self._rankings, self._refilled()
        )
        return self._placement

    def _refilled(self) -> Budget:
        before_s, self._refilled_s = self._refilled_s, self._clock()
        ticks = (self._refilled_s - before_s) / self._settings.tick_s
        self._budget.refill(ticks, self._settings.max_loads_per_tick)
        return self._budget

    def _count_copies(self, rates: Mapping[AdapterVersion, DemandRate], num_replicas: int) -> None:
        """How many holders each version should have from now on."""
        total = sum(rate.work for rate in rates.values())
        share, now_s = self._settings.work_share_per_holder, self._clock()
        patience_s = self._settings.shrink_after_ticks * self._settings.tick_s
        copies = {}
        for version, rate in rates.items():
            count = copies_wanted(rate.work, total, num_replicas, share)
            before = self._copies.get(version, _Copies(count))
            copies[version] = before.next(count, now_s, patience_s)
        self._copies = copies

    def _reserve(
        self,
        item: Reservation,
        wanted: Mapping[AdapterVersion, WantedAdapter],
        facts: Mapping[AdapterVersion, AdapterFacts],
    ) -> WantedAdapter:
        own, old = wanted.get(item.version), wanted.get(item.replaces or item.version)
        alike = [each for each in (own, old) if each is not None]
        held_by_old = len(self._placement.holders.get(item.replaces, ())) if item.replaces else 0
        return WantedAdapter(
            item.version,
            facts[item.version].rows,
            work=max((item.work, *(each.work for each in alike))),
            copies=max((item.copies, held_by_old, *(each.copies for each in alike))),
            requests=max((each.requests for each in alike), default=0.0),
            num_bytes=facts[item.version].num_bytes,
            replaces=item.replaces,
            is_reserved=True,
        )

    def _beside_predecessors(self, reserved: Sequence[Reservation]) -> Placement:
        """The last plan, with each successor that is new to it as if it were where its predecessor is."""
        holders = dict(self._placement.holders)
        for item in reserved:
            if item.replaces in holders:
                holders.setdefault(item.version, holders[item.replaces])
        return replace(self._placement, holders=holders)
