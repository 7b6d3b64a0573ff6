"""When an alias may go over to its new version, and why it has not yet. Pure rules on what is known at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.live_replicas import LiveReplicas
from cluster.placement import Placement
from cluster.table import AdapterFacts
from storage.identity import AdapterVersion

WARM_WITHIN_S = 30.0
"""A successor that one replica has on its device serves after this long, though other holders still load it."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """`plan` is None before the first one; `bad`: versions no alias should serve, and why."""

    replicas: LiveReplicas
    facts: Mapping[AdapterVersion, AdapterFacts]
    bad: Mapping[AdapterVersion, str]
    plan: Placement | None

    def is_good(self, version: AdapterVersion) -> bool:
        return version in self.facts and version not in self.bad

    def is_ready(self, old: AdapterVersion, new: AdapterVersion, moving_for_s: float) -> bool:
        """Whether an alias may flip from `old` to `new`, which is good.

        It waits only while the old version is good, asked for and held: then until all who are to hold the new one have
        it. Nobody waits for a version that fits only in the old one's place.
        """
        if not self.is_good(old):
            return True
        if self.plan is None or self.is_too_large(new):
            return False
        old_holders = self.plan.holders.get(old, ())
        if not any(replica_id in self.replicas for replica_id in old_holders):
            return True
        if new in self.plan.no_room or self.replicas.have(new, old_holders):
            return True
        if self.replicas.have(new, self.plan.holders.get(new, ())):
            return True
        return moving_for_s >= WARM_WITHIN_S and new in self.replicas.residents

    def is_too_large(self, version: AdapterVersion) -> bool:
        """For every bank there is."""
        return self.replicas.most_rows > 0 and self.facts[version].rows > self.replicas.most_rows

    def why_not(self, desired: AdapterVersion) -> str:
        """Why an alias does not serve what it should."""
        if desired in self.bad:
            return f"failed: {self.bad[desired]}"
        if desired not in self.facts:
            return "failed: it cannot be read"
        if self.is_too_large(desired):
            return f"no room: it has {self.facts[desired].rows} rows, more than any bank"
        holders = self.plan.holders.get(desired, ()) if self.plan else ()
        ready = [r for r in holders if self.replicas.have(desired, (r,))]
        return f"warming: on {len(ready)} of {len(holders)} replicas"
