"""Which versions cannot be served, and by whom: from what replicas report and what the registry has quarantined.

A version the registry has quarantined is bad everywhere. One that a replica could not load is bad while no replica has
it on its device; as long as one does, the fault is that of the replica which failed, and the version is only planned
elsewhere. A report of corrupt bytes is a suspicion until a second reader has looked: see `suspects`. If that one finds
them whole, the version is not bad as long as some replica is left that may load it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from storage.errors import AdapterCorruptError, FailedVersion
from storage.identity import AdapterVersion


class VersionHealth:
    """Not thread-safe: one caller at a time. A failure is remembered until the replica that told of it has the version
    on its device or is gone, or the version leaves quarantine: the content of a version never changes, so trying
    again by itself would not help. Bytes called corrupt may be whole by now: that is remembered as long as it is told.
    """

    def __init__(self) -> None:
        self._failures: dict[AdapterVersion, dict[str, FailedVersion]] = {}
        self._quarantined: Mapping[AdapterVersion, str] = {}
        self._acquitted: set[tuple[AdapterVersion, str]] = set()

    def report(
        self, replica_id: str, failed: Collection[FailedVersion], device: Collection[AdapterVersion]
    ) -> None:
        """What a replica could not load, and what it has loaded."""
        for one in failed:
            if one.version not in device:
                self._failures.setdefault(one.version, {})[replica_id] = one
        told = {one.version for one in failed}
        for version in [v for v, by in self._failures.items() if replica_id in by]:
            is_corrupt = self._failures[version][replica_id].code == AdapterCorruptError.code
            if version in device or (is_corrupt and version not in told):
                self._forget(version, replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and what failed there is no longer known to fail."""
        for version in [v for v, by in self._failures.items() if replica_id in by]:
            self._forget(version, replica_id)

    def set_quarantined(self, quarantined: Mapping[AdapterVersion, str]) -> None:
        """The registry's word: version → why. One that is no longer in it was published again, whole."""
        for version in self._quarantined.keys() - quarantined.keys():
            for replica_id in list(self._failures.get(version, ())):
                self._forget(version, replica_id)
        self._quarantined = dict(quarantined)

    def acquit(self, version: AdapterVersion) -> None:
        """The registry's bytes were read again and are good: who called them corrupt was wrong."""
        for replica_id, one in self._failures.get(version, {}).items():
            if one.code == AdapterCorruptError.code:
                self._acquitted.add((version, replica_id))

    def suspects(self) -> tuple[FailedVersion, ...]:
        """Versions called corrupt that nobody has looked at since."""
        return tuple(
            next(iter(told))
            for version, by in self._failures.items()
            if version not in self._quarantined
            and (told := [one for replica_id, one in by.items() if self._is_open(one, replica_id)])
        )

    def bad(
        self, residents: Collection[AdapterVersion], live: Collection[str]
    ) -> dict[AdapterVersion, str]:
        """Versions no alias should serve, and why. `residents` are on some device; `live` are all replicas."""
        bad = {}
        for version, by in self._failures.items():
            if version in residents:
                continue
            told = [one for replica_id, one in by.items() if not self._is_excused(one, replica_id)]
            if told or by.keys() >= set(live):
                bad[version] = _text(next(iter(told or by.values())))
        return {**bad, **self._quarantined}

    def failed_on(self) -> dict[AdapterVersion, dict[str, str]]:
        """Version → replica that could not load it → why."""
        return {
            version: {replica_id: _text(one) for replica_id, one in by.items()}
            for version, by in self._failures.items()
        }

    def unfit(self, replica_id: str) -> frozenset[AdapterVersion]:
        """What this replica could not load."""
        return frozenset(version for version, by in self._failures.items() if replica_id in by)

    def _is_open(self, one: FailedVersion, replica_id: str) -> bool:
        return one.code == AdapterCorruptError.code and not self._is_excused(one, replica_id)

    def _is_excused(self, one: FailedVersion, replica_id: str) -> bool:
        is_corrupt = one.code == AdapterCorruptError.code
        return is_corrupt and (one.version, replica_id) in self._acquitted

    def _forget(self, version: AdapterVersion, replica_id: str) -> None:
        self._acquitted.discard((version, replica_id))
        by = self._failures[version]
        del by[replica_id]
        if not by:
            del self._failures[version]


def _text(one: FailedVersion) -> str:
    return f"{one.code}: {one.message}"
