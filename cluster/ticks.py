"""A tick of the placement manager: from a copy of all that is known to a plan, with nobody waiting meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.placement import Placement, ReplicaSpace
from cluster.planner import PlacementPlanner, Reservation
from cluster.serving import Flip
from cluster.spares import missing_copies
from cluster.table import AdapterFacts, DemandSample
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class TickInputs:
    """All that a plan is made from, beside what the planner remembers."""

    spaces: tuple[ReplicaSpace, ...]
    facts: Mapping[AdapterVersion, AdapterFacts]
    bad: Mapping[AdapterVersion, str]
    reserved: tuple[Reservation, ...]
    demand: tuple[Mapping[AdapterVersion, DemandSample], ...]  # since the last tick
    inherited: tuple[tuple[Flip, float], ...]  # with the ratio of work per token
    kept: Mapping[str, frozenset[AdapterVersion]] | None
    """What each replica has on any tier; None when no replica is about to leave."""


@dataclass(frozen=True, slots=True)
class TickResult:
    placement: Placement
    near: Mapping[str, tuple[AdapterVersion, ...]] | None
    """Second copies still to be made, by replica; None when no replica is about to leave."""


def make_plan(planner: PlacementPlanner, inputs: TickInputs) -> TickResult:
    """The planner's next plan."""
    for demand in inputs.demand:
        planner.observe(demand)
    for flip, work_ratio in inputs.inherited:
        planner.inherit(flip.old, flip.new, work_ratio)
    placement = planner.plan(inputs.spaces, inputs.facts, inputs.reserved)
    if inputs.kept is None:
        return TickResult(placement, None)
    # What has no holder now has none to lose, and there may be more of it than any disk holds.
    wanted = placement.holders.keys() - inputs.bad.keys()
    unfit = {space.replica_id: space.unfit for space in inputs.spaces}
    return TickResult(placement, missing_copies(wanted, inputs.kept, unfit))
