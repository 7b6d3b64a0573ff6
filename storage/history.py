"""What an alias means, by its moves, what deletes took away, and what is quarantined. Pure: reads no store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from storage.identity import AdapterVersion
from storage.manifest import AliasRecord, Tombstone


def live_record(alias: str, record: AliasRecord, tombstone: Tombstone) -> AliasRecord | None:
    """The record without the moves that deletes took away; None when no move is left.

    Its generation may then be an older one: the version of the newest move was deleted while it was made.
    """
    buried = tombstone.aliases.get(alias, 0)
    moves = [
        move
        for move in record.moves
        if move.generation > buried and move.version not in tombstone.versions
    ]
    return AliasRecord.of(moves) if moves else None


def newest_good(
    versions: Iterable[AdapterVersion], is_good: Callable[[AdapterVersion], bool]
) -> AdapterVersion | None:
    """The first good one of an alias's versions, newest first: the previous version serves when this one cannot."""
    return next((version for version in versions if is_good(version)), None)


def versions_of(record: AliasRecord) -> tuple[AdapterVersion, ...]:
    """What an alias meant, newest first, each version once."""
    return tuple(dict.fromkeys(AdapterVersion(move.version) for move in record.moves))
