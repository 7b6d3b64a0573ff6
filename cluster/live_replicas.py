"""Which replicas live, by what they and the routers say, and which adapters lie on their devices.

Pure; time comes from the clock passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.changes import ChangeLog
from cluster.table import ReplicaLoad, ReplicaReport
from storage.identity import AdapterVersion


@dataclass(frozen=True, slots=True)
class LiveReplica:
    """What a replica said last. `device` holds the same versions as its report, which is brief only while nothing is
    known of what it leaves out.
    """

    report: ReplicaReport
    device: frozenset[AdapterVersion]
    heard_at_s: float


class LiveReplicas:
    """Not thread-safe: one caller at a time.

    Args:
        silence_s: a replica that was not heard of for longer is dead.
        clock: seconds; only differences matter.
    """

    def __init__(self, silence_s: float, clock: Callable[[], float]) -> None:
        self._silence_s = silence_s
        self._clock = clock
        self._live: dict[str, LiveReplica] = {}
        self._leaving: frozenset[str] = frozenset()
        self._residents: ChangeLog[AdapterVersion, tuple[str, ...]] = ChangeLog()
        self.stamp = 1  # of the last change of residents

    # What is reported.

    def hear(self, report: ReplicaReport) -> bool:
        """Take a heartbeat. False, and no effect, from a replica that is leaving."""
        replica_id = report.replica_id
        if replica_id in self._leaving:
            return False
        before = self._live.get(replica_id)
        if report.is_brief and before is not None and not before.report.is_brief:
            known = before.report
            report = replace(report, host=known.host, disk=known.disk, is_brief=False)
        device = frozenset(report.device)
        if before is not None and before.device == device:
            device = before.device
        else:
            self._move_residents(replica_id, before.device if before else frozenset(), device)
        self._live[replica_id] = LiveReplica(report, device, self._clock())
        return True

    def lose(self, replica_ids: Iterable[str]) -> tuple[str, ...]:
        """Take a router's word that these are dead. One that is not comes back with its next heartbeat.

        Returns those that were live.
        """
        return self._drop(replica_ids)

    def leave(self, replica_ids: Iterable[str]) -> tuple[str, ...]:
        """Take all that are leaving now, in place of those named before. Returns those that were live."""
        self._leaving = frozenset(replica_ids)
        return self._drop(self._leaving)

    def expire(self) -> tuple[str, ...]:
        """Forget replicas that have been silent too long. Returns them."""
        deadline_s = self._clock() - self._silence_s
        return self._drop([r for r, one in self._live.items() if one.heard_at_s < deadline_s])

    # What is known.

    def __contains__(self, replica_id: object) -> bool:
        return replica_id in self._live

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._live))

    def __len__(self) -> int:
        return len(self._live)

    def __getitem__(self, replica_id: str) -> LiveReplica:
        return self._live[replica_id]

    def get(self, replica_id: str) -> LiveReplica | None:
        return self._live.get(replica_id)

    def reports(self) -> tuple[ReplicaReport, ...]:
        return tuple(self._live[replica_id].report for replica_id in self)

    def loads(self) -> dict[str, ReplicaLoad]:
        return {replica_id: self._live[replica_id].report.load for replica_id in self}

    def ages_s(self) -> dict[str, float]:
        """Seconds since each replica was heard of."""
        now_s = self._clock()
        return {replica_id: now_s - self._live[replica_id].heard_at_s for replica_id in self}

    @property
    def most_rows(self) -> int:
        """Of the largest bank; 0 without any."""
        return max((one.report.rows for one in self._live.values()), default=0)

    @property
    def residents(self) -> Mapping[AdapterVersion, tuple[str, ...]]:
        """Who has each version on its device, by id."""
        return self._residents.values

    @property
    def resident_changes(self) -> ChangeLog[AdapterVersion, tuple[str, ...]]:
        return self._residents

    def have(self, version: AdapterVersion, replica_ids: Iterable[str]) -> bool:
        """Whether all of these have it on their device; none live among them is no."""
        live = [self._live[r] for r in replica_ids if r in self._live]
        return bool(live) and all(version in one.device for one in live)

    def kept(self) -> dict[str, frozenset[AdapterVersion]]:
        """What each has on its device, in its memory or on its disk."""
        return {
            replica_id: self._live[replica_id].device.union(
                self._live[replica_id].report.host, self._live[replica_id].report.disk
            )
            for replica_id in self
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if the residents are not what the reports say."""
        told: dict[AdapterVersion, list[str]] = {}
        for replica_id in self:
            assert self._live[replica_id].device == set(self._live[replica_id].report.device)
            for version in self._live[replica_id].device:
                told.setdefault(version, []).append(replica_id)
        assert self.residents == {version: tuple(ids) for version, ids in told.items()}

    def _drop(self, replica_ids: Iterable[str]) -> tuple[str, ...]:
        dropped = tuple(replica_id for replica_id in replica_ids if replica_id in self._live)
        for replica_id in dropped:
            self._move_residents(replica_id, self._live.pop(replica_id).device, frozenset())
        return dropped

    def _move_residents(
        self,
        replica_id: str,
        before: frozenset[AdapterVersion],
        after: frozenset[AdapterVersion],
    ) -> None:
        self.stamp += 1
        for version in before ^ after:
            others = set(self._residents.values.get(version, ())) - {replica_id}
            who = others | {replica_id} if version in after else others
            if who:
                self._residents.put(version, tuple(sorted(who)), self.stamp)
            else:
                self._residents.drop(version, self.stamp)
