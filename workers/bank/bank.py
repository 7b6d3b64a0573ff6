"""The adapters that are on the device, as rows in pages.

Rows of one projection lie in two tensors, one for each side; any adapter's rows may lie anywhere in them, so ranks mix
without padding. Loads happen on any thread; a step takes a snapshot when it begins and keeps it, so a load never waits
for a step nor a step for a load.

Shape legend: N bank pages, I input features, O output features, R rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError, CapacityError
from storage.identity import AdapterVersion
from workers.bank.groups import GroupRoom, GroupTable, ModuleGroup
from workers.bank.layout import ModuleLayout, SlotPages
from workers.bank.magnitude import with_scale
from workers.bank.module_bank import ModuleBank
from workers.bank.pages import NUM_RESERVED, PageAllocator
from workers.row_form.step_plan import NotResidentError


class BankBusyError(Exception):
    """The adapter fits the bank, but not beside those in use or pinned now. Worth another try after a release."""


@dataclass(frozen=True, slots=True, eq=False)
class BankSnapshot:
    """What a step may use: each module's group table, with the slots that were ready when it was taken."""

    table_of: Mapping[str, GroupTable]


@dataclass(slots=True)
class _Resident:
    """One adapter's place. `last_used` is a count of uses, not a time."""

    slot: int
    version: AdapterVersion
    is_ready: bool = False
    references: int = 0
    last_used: int = 0


@dataclass(slots=True)
class BankCounters:
    loads: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _Books:
    """Everything the lock guards."""

    groups: list[ModuleGroup]
    free_slots: list[int]
    by_version: dict[AdapterVersion, _Resident] = field(default_factory=dict)
    pinned: frozenset[AdapterVersion] = frozenset()
    uses: int = 0


class AdapterBank:
    """See the module's docstring. Every method may be called from any thread.

    Args:
        projections: logical projection path → (in, out) features.
        num_rows: rank rows every projection can hold, for all adapters together.
        num_slots: adapters it can hold.
        dtype: of the rows; the model's own type in serving, float32 in training.
        biases: base biases by projection, needed where an adapter changes a bias.
        base_weight: base weight_OI of a projection, needed where an adapter measures it (DoRA); without it such
            adapters are refused.
    """

    def __init__(
        self,
        projections: Mapping[str, tuple[int, int]],
        *,
        num_rows: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        biases: Mapping[str, Tensor] = MappingProxyType({}),
        base_weight: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = device
        self.counters = BankCounters()
        self._base_weight = base_weight
        pages = num_rows + NUM_RESERVED
        self.modules = {
            path: ModuleBank.empty(pages, shape, biases.get(path), dtype, device)
            for path, shape in projections.items()
        }
        self._lock = threading.Lock()
        self._books = _Books([self._empty_group()], list(range(num_slots)))
        self._snapshot = self._take_snapshot()

    def _empty_group(self) -> ModuleGroup:
        return ModuleGroup(
            tuple(self.modules), PageAllocator(self.num_rows), PageAllocator(self.num_rows)
        )

    # What a step needs.

    @property
    def snapshot(self) -> BankSnapshot:
        """The current tables. Slots acquired before this call are in it, and stay valid until released."""
        return self._snapshot

    def acquire(self, version: AdapterVersion) -> int:
        """The adapter's slot, which cannot be evicted until `release`. Raises NotResidentError."""
        with self._lock:
            resident = self._books.by_version.get(version)
            if resident is None or not resident.is_ready:
                raise NotResidentError(f"adapter {version} is not resident")
            resident.references += 1
            self._books.uses += 1
            resident.last_used = self._books.uses
            return resident.slot

    def release(self, version: AdapterVersion) -> None:
        """Give one reference back."""
        with self._lock:
            resident = self._books.by_version[version]
            if resident.references == 0:
                raise ValueError(f"adapter {version} is released more often than acquired")
            resident.references -= 1

    # Who is here.

    def find(self, version: AdapterVersion) -> int | None:
        """The adapter's slot if its rows are ready, else None."""
        with self._lock:
            resident = self._books.by_version.get(version)
            return resident.slot if resident is not None and resident.is_ready else None

    def residents(self) -> tuple[AdapterVersion, ...]:
        """Ready adapters, least recently used first."""
        with self._lock:
            ready = [one for one in self._books.by_version.values() if one.is_ready]
        return tuple(one.version for one in sorted(ready, key=lambda one: one.last_used))

    def references(self) -> dict[AdapterVersion, int]:
        """How often each adapter in use is held."""
        with self._lock:
            held = self._books.by_version.values()
            return {one.version: one.references for one in held if one.references}

    @property
    def resident_slots(self) -> frozenset[int]:
        with self._lock:
            return self._ready_slots()

    @property
    def rows_used(self) -> int:
        """Rows taken in the fullest projection."""
        with self._lock:
            return max((group.rows_used for group in self._books.groups), default=0)

    def pages_of(self, version: AdapterVersion) -> dict[str, SlotPages]:
        """Where a resident adapter's rows lie in each projection. Raises NotResidentError."""
        with self._lock:
            resident = self._books.by_version.get(version)
            if resident is None:
                raise NotResidentError(f"adapter {version} is not resident")
            return {
                path: group.slots[resident.slot]
                for group in self._books.groups
                for path in group.modules
            }

    # Coming and going.

    def load(self, version: AdapterVersion, rows: AdapterRows) -> int:
        """Bring an adapter to the device, evicting idle unpinned ones, least recently used first.

        Returns its slot; at once when it is resident. Callers see to it that one version is loaded by one thread.

        Raises:
            AdapterRefusedError: a projection the model does not have, a wrong shape, a value that is not finite, or a
                magnitude that cannot be measured.
            CapacityError: more rows than the whole bank holds.
            BankBusyError: no room beside adapters in use, pinned or being loaded.
        """
        for path, module_rows in rows.modules.items():
            if path not in self.modules:
                raise AdapterRefusedError(f"the model has no projection {path!r}", param=path)
            self.modules[path].check(path, module_rows)
            if module_rows.magnitude_O is not None and self._base_weight is None:
                raise AdapterRefusedError(
                    f"{path} has a magnitude (DoRA), which only serving supports", param=path
                )
        layouts = {path: ModuleLayout.of(rows.modules.get(path)) for path in self.modules}
        with self._lock:
            books = self._books
            known = books.by_version.get(version)
            if known is not None and known.is_ready:
                return known.slot
            if known is not None:
                raise BankBusyError(f"adapter {version} is being loaded by another thread")
            self._make_room(layouts)
            resident = _Resident(books.free_slots.pop(0), version)
            books.by_version[version] = resident
            for group in books.groups:
                group.allocate(resident.slot, layouts[group.modules[0]])
            places = {
                path: group.slots[resident.slot] for group in books.groups for path in group.modules
            }
        try:
            for path, module_rows in rows.modules.items():
                self.modules[path].write(self._measured(path, module_rows), places[path])
        except BaseException:
            with self._lock:
                self._leave(resident)
            raise
        with self._lock:
            resident.is_ready = True
            books.uses += 1
            resident.last_used = books.uses
            self.counters.loads += 1
            self._snapshot = self._take_snapshot()
        return resident.slot

    def _measured(self, path: str, rows: ModuleRows) -> ModuleRows:
        """The rows as the device knows them: with no magnitude."""
        if rows.magnitude_O is None or self._base_weight is None:
            return rows
        measured = with_scale(path, rows, self._base_weight(path))
        self.modules[path].check(path, measured)
        return measured

    def evict(self, version: AdapterVersion) -> None:
        """Free an idle adapter's rows. Raises BankBusyError while it is in use; no error when it is not here."""
        with self._lock:
            resident = self._books.by_version.get(version)
            if resident is None:
                return
            if resident.references or not resident.is_ready:
                raise BankBusyError(f"adapter {version} is in use")
            self._evict(resident)
            self._snapshot = self._take_snapshot()

    def pin(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep exactly these from eviction, whether they are resident yet or not."""
        with self._lock:
            self._books.pinned = frozenset(versions)

    def check_integrity(self) -> bool:
        """Every page and slot has one owner or none, and every reference a resident."""
        with self._lock:
            books = self._books
            taken = [one.slot for one in books.by_version.values()]
            return (
                sorted([*books.free_slots, *taken]) == list(range(self.num_slots))
                and all(one.references >= 0 for one in books.by_version.values())
                and all(group.check_integrity() for group in books.groups)
                and all(sorted(group.slots) == sorted(taken) for group in books.groups)
                and sorted(path for group in books.groups for path in group.modules)
                == sorted(self.modules)
            )

    # Inside the lock.

    def _ready_slots(self) -> frozenset[int]:
        return frozenset(one.slot for one in self._books.by_version.values() if one.is_ready)

    def _take_snapshot(self) -> BankSnapshot:
        ready = self._ready_slots()
        tables = {
            path: table
            for group in self._books.groups
            for table in [group.table(ready, self.num_slots, self.device)]
            for path in group.modules
        }
        return BankSnapshot(tables)

    def _make_room(self, layouts: Mapping[str, ModuleLayout]) -> None:
        books = self._books
        most = max((max(one.num_in, one.num_out) for one in layouts.values()), default=0)
        if most > self.num_rows:
            raise CapacityError(
                f"the adapter needs {most} rows in one projection; the bank holds {self.num_rows}"
            )
        if not books.by_version:
            books.groups = [self._empty_group()]
        groups = [part for group in books.groups for part in group.split(layouts)]
        victims = sorted(
            (
                one
                for one in books.by_version.values()
                if one.is_ready and not one.references and one.version not in books.pinned
            ),
            key=lambda one: one.last_used,
        )
        # Nobody is evicted before it is known that evicting the first `count` victims is enough.
        count = 0
        room = [GroupRoom(group, layouts[group.modules[0]]) for group in groups]
        while not (all(one.is_enough for one in room) and (books.free_slots or count)):
            if count == len(victims):
                raise BankBusyError("no room beside the adapters in use")
            for one in room:
                one.without(victims[count].slot)
            count += 1
        books.groups = groups
        for victim in victims[:count]:
            self._evict(victim)

    def _evict(self, resident: _Resident) -> None:
        self._leave(resident)
        self.counters.evictions += 1

    def _leave(self, resident: _Resident) -> None:
        books = self._books
        del books.by_version[resident.version]
        for group in books.groups:
            group.free(resident.slot)
        books.free_slots.append(resident.slot)
