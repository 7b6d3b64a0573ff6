"""Which adapter holds which slot and which row pages: the bank's accounting, without a tensor.

Shape legend of the tables: see `groups.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from storage.errors import CapacityError
from storage.identity import AdapterVersion
from workers.bank.eviction import readiness_to_leave
from workers.bank.groups import GroupRoom, ModuleGroup
from workers.bank.layout import ModuleLayout, SlotPages
from workers.bank.pages import PageAllocator
from workers.row_form.step_plan import NotResidentError


class BankBusyError(Exception):
    """The adapter fits the bank, but not beside those in use or pinned now. Worth another try after a release."""


@dataclass(slots=True)
class Resident:
    """One adapter's place. `last_used` is a count of uses, not a time."""

    slot: int
    version: AdapterVersion
    rows: int  # of its largest projection
    is_ready: bool = False  # its rows are written, and steps know where
    references: int = 0
    last_used: int = 0


class BankBooks:
    """Not thread-safe: the bank's lock guards it. Every operation is short, for a step may wait for it.

    Args:
        modules: every projection's path.
        num_rows: pages of each side of every projection.
        num_slots: adapters.
    """

    def __init__(self, modules: tuple[str, ...], *, num_rows: int, num_slots: int) -> None:
        self._modules = modules
        self._num_rows = num_rows
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))
        self._by_version: dict[AdapterVersion, Resident] = {}
        self._pinned: frozenset[AdapterVersion] = frozenset()
        self._uses = 0
        self._groups = [self._empty_group()]
        self.num_evictions = 0

    # Who is here.

    def find(self, version: AdapterVersion) -> Resident | None:
        """Also one that is not ready."""
        return self._by_version.get(version)

    def residents(self) -> list[Resident]:
        """Ready ones, least recently used first."""
        ready = [one for one in self._by_version.values() if one.is_ready]
        return sorted(ready, key=lambda one: one.last_used)

    def ready_slots(self) -> frozenset[int]:
        return frozenset(one.slot for one in self._by_version.values() if one.is_ready)

    def references(self) -> dict[AdapterVersion, int]:
        return {one.version: one.references for one in self._by_version.values() if one.references}

    @property
    def rows_used(self) -> int:
        """Rows taken in the fullest projection."""
        return max((group.rows_used for group in self._groups), default=0)

    def pages_of(self, resident: Resident) -> dict[str, SlotPages]:
        """Where its rows lie in each projection."""
        return {
            path: group.slots[resident.slot] for group in self._groups for path in group.modules
        }

    def pages_by_group(
        self, newcomer: Resident | None = None
    ) -> list[tuple[tuple[str, ...], dict[int, SlotPages]]]:
        """Modules with one page map, and the pages of every ready slot, and of `newcomer`, in them."""
        slots = self.ready_slots() | ({newcomer.slot} if newcomer is not None else set())
        return [
            (
                group.modules,
                {slot: taken for slot, taken in group.slots.items() if slot in slots},
            )
            for group in self._groups
        ]

    # In use, or kept.

    def acquire(self, version: AdapterVersion) -> Resident:
        """One more reference. Raises NotResidentError."""
        resident = self._by_version.get(version)
        if resident is None or not resident.is_ready:
            raise NotResidentError(f"adapter {version} is not resident")
        resident.references += 1
        self._use(resident)
        return resident

    def release(self, version: AdapterVersion) -> None:
        resident = self._by_version[version]
        if resident.references == 0:
            raise ValueError(f"adapter {version} is released more often than acquired")
        resident.references -= 1

    def pin(self, versions: Iterable[AdapterVersion]) -> None:
        self._pinned = frozenset(versions)

    # Coming and going.

    def admit(self, version: AdapterVersion, layouts: Mapping[str, ModuleLayout]) -> Resident:
        """A slot and pages for an adapter that is not here, not ready yet. Evicts as few as need be, and nobody when
        it raises.

        Raises:
            CapacityError: more rows than the whole bank holds.
            BankBusyError: no room beside adapters in use, pinned or being loaded.
        """
        rows = max((max(one.num_in, one.num_out) for one in layouts.values()), default=0)
        self._make_room(layouts, rows)
        resident = Resident(self._free_slots.pop(0), version, rows)
        self._by_version[version] = resident
        for group in self._groups:
            group.allocate(resident.slot, layouts[group.modules[0]])
        return resident

    def make_ready(self, resident: Resident) -> None:
        resident.is_ready = True
        self._use(resident)

    def remove(self, resident: Resident) -> None:
        """Free its slot and pages."""
        del self._by_version[resident.version]
        for group in self._groups:
            group.free(resident.slot)
        self._free_slots.append(resident.slot)

    def evict(self, resident: Resident) -> None:
        self.remove(resident)
        self.num_evictions += 1

    def check_integrity(self) -> bool:
        """Every page and slot has one owner or none, and every reference a resident."""
        taken = [one.slot for one in self._by_version.values()]
        return (
            sorted([*self._free_slots, *taken]) == list(range(self._num_slots))
            and all(one.references >= 0 for one in self._by_version.values())
            and all(one.is_ready or not one.references for one in self._by_version.values())
            and all(group.check_integrity() for group in self._groups)
            and all(sorted(group.slots) == sorted(taken) for group in self._groups)
            and sorted(path for group in self._groups for path in group.modules)
            == sorted(self._modules)
        )

    def _use(self, resident: Resident) -> None:
        self._uses += 1
        resident.last_used = self._uses

    def _readiness_to_leave(self, resident: Resident) -> float:
        return readiness_to_leave(resident.rows, self._uses + 1 - resident.last_used)

    def _empty_group(self) -> ModuleGroup:
        return ModuleGroup(
            self._modules, PageAllocator(self._num_rows), PageAllocator(self._num_rows)
        )

    def _make_room(self, layouts: Mapping[str, ModuleLayout], rows: int) -> None:
        if rows > self._num_rows:
            raise CapacityError(
                f"the adapter needs {rows} rows in one projection; the bank holds {self._num_rows}"
            )
        if not self._by_version:
            self._groups = [self._empty_group()]
        groups = [part for group in self._groups for part in group.split(layouts)]
        victims = [
            one
            for one in self.residents()
            if not one.references and one.version not in self._pinned
        ]
        victims.sort(key=self._readiness_to_leave, reverse=True)
        # Nobody is evicted before it is known that evicting the first `count` victims is enough.
        count = 0
        room = [GroupRoom(group, layouts[group.modules[0]]) for group in groups]
        while not (all(one.is_enough for one in room) and (self._free_slots or count)):
            if count == len(victims):
                raise BankBusyError("no room beside the adapters in use")
            for one in room:
                one.without(victims[count].slot)
            count += 1
        self._groups = groups
        for victim in victims[:count]:
            self.evict(victim)
