"""The requests that wait, and who of them goes first: the tenant that was served least, of its adapters the one that
was served least, of that one's requests the oldest.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Mapping
from itertools import count

from storage.identity import AdapterVersion
from workers.engine.fairness import VirtualCounters
from workers.engine.sequence import Sequence

Account = tuple[str, AdapterVersion | None]
"""Whose service it is: a tenant, and an adapter or the base model."""


def account_of(sequence: Sequence) -> Account:
    return sequence.request.tenant, sequence.version


class FairQueue:
    """See the module's docstring. It knows service, not room: who may start is the scheduler's business."""

    def __init__(self) -> None:
        self._groups: dict[Account, dict[str, Sequence]] = {}
        self._tenants: VirtualCounters[str] = VirtualCounters()
        self._adapters: dict[str, VirtualCounters[AdapterVersion | None]] = {}

    def add(self, sequence: Sequence) -> None:
        """Behind all others of its account."""
        account = tenant, version = account_of(sequence)
        self._groups.setdefault(account, {})[sequence.request.request_id] = sequence
        self._tenants.join(tenant)
        self._adapters.setdefault(tenant, VirtualCounters()).join(version)

    def start(self, sequence: Sequence) -> None:
        """It waits no more. Raises KeyError if it did not."""
        account = tenant, version = account_of(sequence)
        group = self._groups[account]
        del group[sequence.request.request_id]
        if not group:
            del self._groups[account]
        self._adapters[tenant].start(version)
        self._tenants.start(tenant)

    def leave(self, sequence: Sequence) -> None:
        """One that was started is gone. Raises KeyError if there is none of its account."""
        tenant, version = account_of(sequence)
        self._adapters[tenant].leave(version)
        for forgotten in self._tenants.leave(tenant):
            del self._adapters[forgotten]

    def adapters(self) -> set[AdapterVersion | None]:
        """What requests wait for."""
        return {version for _, version in self._groups}

    def charge(self, account: Account, work: float) -> None:
        """Rank-weighted tokens were computed for a request of this account."""
        tenant, version = account
        self._tenants.charge(tenant, work)
        self._adapters[tenant].charge(version, work)

    def standing(self, account: Account) -> tuple[float, float]:
        """The service a tenant, and its adapter, have had: the lower goes first."""
        tenant, version = account
        return self._tenants.served(tenant), self._adapters[tenant].served(version)

    def in_order(
        self, owed: Mapping[Account, float], skip: Container[AdapterVersion | None]
    ) -> Iterator[Sequence]:
        """Those that wait, as if each were served what it asks for at once when it is its turn.

        Nobody may come or go until the iteration ends.

        Args:
            owed: work that was promised to running requests and is not computed yet, by account.
            skip: adapters whose (further) requests are passed over; may grow meanwhile.
        """
        by_tenant: dict[str, list[tuple[float, int, AdapterVersion | None]]] = {}
        tenant_owed: dict[str, float] = {}
        number = count()
        for account, work in owed.items():
            tenant_owed[account[0]] = tenant_owed.get(account[0], 0.0) + work
        for tenant, version in self._groups:
            served = self._adapters[tenant].served(version) + owed.get((tenant, version), 0.0)
            by_tenant.setdefault(tenant, []).append((served, next(number), version))
        tenants = [
            (self._tenants.served(tenant) + tenant_owed.get(tenant, 0.0), next(number), tenant)
            for tenant in by_tenant
        ]
        heapq.heapify(tenants)
        for adapters in by_tenant.values():
            heapq.heapify(adapters)
        members = {account: iter(group.values()) for account, group in self._groups.items()}
        while tenants:
            served, _, tenant = tenants[0]
            adapters = by_tenant[tenant]
            if not adapters:
                heapq.heappop(tenants)
                continue
            adapter_served, _, version = adapters[0]
            sequence = None if version in skip else next(members[tenant, version], None)
            if sequence is None:
                heapq.heappop(adapters)
                continue
            yield sequence
            if version in skip:
                continue
            work = sequence.num_pending * sequence.request.work_per_token
            heapq.heapreplace(adapters, (adapter_served + work, next(number), version))
            heapq.heapreplace(tenants, (served + work, next(number), tenant))

    def check_integrity(self) -> bool:
        return (
            all(self._groups.values())
            and self._tenants.check_integrity()
            and all(one.check_integrity() for one in self._adapters.values())
        )
