"""The placement table as its readers follow it: one epoch after another, sent as changes."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.changes import ChangeLog
from cluster.live_replicas import LiveReplicas
from cluster.table import AdapterFacts, AliasKey, PlacementTable, ReaderReport, TableUpdate
from storage.identity import AdapterVersion


class TableLog:
    """Not thread-safe: one caller at a time.

    Args:
        first_epoch: positive, and above every epoch of a predecessor; also signs the tables, for a reader's changes
            must be taken from the table it has.
    """

    def __init__(self, base_id: str, first_epoch: int) -> None:
        self._base_id = base_id
        self._author = first_epoch
        self.epoch = first_epoch
        self._serving: ChangeLog[AliasKey, AdapterVersion] = ChangeLog()
        self._holders: ChangeLog[AdapterVersion, tuple[str, ...]] = ChangeLog()
        self._facts: ChangeLog[AdapterVersion, AdapterFacts] = ChangeLog()

    @property
    def serving(self) -> Mapping[AliasKey, AdapterVersion]:
        return self._serving.values

    @property
    def holders(self) -> Mapping[AdapterVersion, tuple[str, ...]]:
        return self._holders.values

    @property
    def facts(self) -> Mapping[AdapterVersion, AdapterFacts]:
        return self._facts.values

    def publish(
        self,
        serving: Mapping[AliasKey, AdapterVersion],
        holders: Mapping[AdapterVersion, tuple[str, ...]],
        facts: Mapping[AdapterVersion, AdapterFacts],
    ) -> None:
        """Make this the table, under a new epoch if anything in it is new."""
        epoch = self.epoch + 1
        changed = (
            self._serving.replace(serving, epoch),
            self._holders.replace(holders, epoch),
            self._facts.replace(facts, epoch),
        )
        if any(changed):
            self.epoch = epoch

    def update(self, reader: ReaderReport, replicas: LiveReplicas) -> TableUpdate:
        """What has changed since the reader's last poll; everything if another manager answered that."""
        is_ours = reader.author == self._author
        if not is_ours and reader.epoch > self.epoch:
            self.epoch = reader.epoch + 1  # a predecessor on a faster clock got further
        since = reader.epoch if is_ours else 0
        return TableUpdate(
            epoch=self.epoch,
            author=self._author,
            since=since,
            base_id=self._base_id,
            replicas=replicas.loads(),
            serving=self._serving.since(since),
            holders=self._holders.since(since),
            facts=self._facts.since(since),
            residents=replicas.resident_changes.since(reader.residents_stamp if is_ours else 0),
            residents_stamp=replicas.stamp,
        )

    def table(self, replicas: LiveReplicas) -> PlacementTable:
        """A copy of all of it."""
        return PlacementTable(
            epoch=self.epoch,
            base_id=self._base_id,
            serving=dict(self.serving),
            holders=dict(self.holders),
            facts=dict(self.facts),
            replicas=replicas.loads(),
            residents=dict(replicas.residents),
        )
