"""A second copy of everything that has a holder, before a replica leaves that nobody can choose. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from cluster.rendezvous import preference
from storage.identity import AdapterVersion

COPIES = 2


def missing_copies(
    wanted: Iterable[AdapterVersion],
    kept: Mapping[str, Collection[AdapterVersion]],
    unfit: Mapping[str, Collection[AdapterVersion]],
) -> dict[str, tuple[AdapterVersion, ...]]:
    """Replica → versions it should fetch, so that each of `wanted` is on two replicas; empty when no more can be done.

    Args:
        kept: what every live replica has, on any tier. With fewer than two of them nothing can be done.
        unfit: what a replica could not load.
    """
    missing: dict[str, list[AdapterVersion]] = {}
    if len(kept) < COPIES:
        return {}
    for version in sorted(wanted):
        keepers = {replica_id for replica_id, versions in kept.items() if version in versions}
        if len(keepers) >= COPIES:
            continue
        failed = {replica_id for replica_id, versions in unfit.items() if version in versions}
        others = preference(version, kept.keys() - keepers - failed)
        for replica_id in others[: COPIES - len(keepers)]:
            missing.setdefault(replica_id, []).append(version)
    return {replica_id: tuple(versions) for replica_id, versions in missing.items()}
