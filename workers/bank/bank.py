"""The adapters that are on the device, as rows in pages.

Rows of one projection lie in two tensors, one for each side; any adapter's rows may lie anywhere in them, so ranks mix
without padding. Loads happen on any thread; a step takes a snapshot when it begins and keeps it, so a load never waits
for a step nor a step for a load.

Shape legend: N bank pages, I input features, O output features, R rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import AdapterRefusedError
from storage.identity import AdapterVersion
from workers.bank.books import BankBooks, BankBusyError, Resident
from workers.bank.groups import GroupTable
from workers.bank.layout import ModuleLayout, SlotPages
from workers.bank.magnitude import with_scale
from workers.bank.module_bank import ModuleBank, check_finite
from workers.bank.pages import NUM_RESERVED
from workers.bank.step_waits import StepWaits
from workers.bank.transfer import RowTransfer
from workers.row_form.step_plan import NotResidentError


@dataclass(frozen=True, slots=True, eq=False)
class BankSnapshot:
    """What a step may use: each module's group table, with the slots that were ready when it was taken."""

    table_of: Mapping[str, GroupTable]
    copied: torch.cuda.Event | None = (
        None  # on a GPU: when the tables, and the rows they name, are there
    )

    def tensors(self) -> Iterator[Tensor]:
        """Of all tables, each once."""
        for table in set(self.table_of.values()):
            yield from table.tensors()


@dataclass(frozen=True, slots=True)
class BankCounters:
    """Since the bank was made."""

    loads: int
    evictions: int
    wait_s: float  # how long the thread that steps has waited for loads, in all


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
        self.dtype = dtype
        self._num_loads = 0
        self.waits = StepWaits()
        self._base_weight = base_weight
        pages = num_rows + NUM_RESERVED
        self.modules = {
            path: ModuleBank.empty(pages, shape, biases.get(path), dtype, device)
            for path, shape in projections.items()
        }
        self._transfer = RowTransfer(device)  # after the zeros, which it lets no load overtake
        self._lock = threading.Lock()  # of the books; held for moments
        self._books = BankBooks(tuple(self.modules), num_rows=num_rows, num_slots=num_slots)
        # Tables follow one another in the order the books changed. Only loads and evictions wait for each other here.
        self._publishing = threading.Lock()
        self._joined: BankSnapshot | None = None
        self._publish()

    # What a step needs.

    @property
    def snapshot(self) -> BankSnapshot:
        """The current tables, for the thread that steps; it never waits for them.

        Slots acquired before this call are in it, and stay valid until released.
        """
        snapshot = self._snapshot
        self._transfer.join(snapshot.copied, () if snapshot is self._joined else snapshot.tensors())
        self._joined = snapshot
        return snapshot

    def acquire(self, version: AdapterVersion) -> int:
        """The adapter's slot, which cannot be evicted until `release`. Raises NotResidentError."""
        with self._locked():
            return self._books.acquire(version).slot

    def release(self, version: AdapterVersion) -> None:
        """Give one reference back."""
        with self._locked():
            self._books.release(version)

    @property
    def resident_slots(self) -> frozenset[int]:
        with self._locked():
            return self._books.ready_slots()

    # Who is here.

    def find(self, version: AdapterVersion) -> int | None:
        """The adapter's slot if its rows are ready, else None."""
        with self._locked():
            resident = self._books.find(version)
            return resident.slot if resident is not None and resident.is_ready else None

    def residents(self) -> tuple[AdapterVersion, ...]:
        """Ready adapters, least recently used first."""
        with self._locked():
            return tuple(one.version for one in self._books.residents())

    def references(self) -> dict[AdapterVersion, int]:
        """How often each adapter in use is held."""
        with self._lock:
            return self._books.references()

    @property
    def counters(self) -> BankCounters:
        with self._lock:
            return BankCounters(self._num_loads, self._books.num_evictions, self.waits.wait_s)

    @property
    def rows_used(self) -> int:
        """Rows taken in the fullest projection."""
        with self._lock:
            return self._books.rows_used

    def pages_of(self, version: AdapterVersion) -> dict[str, SlotPages]:
        """Where a resident adapter's rows lie in each projection. Raises NotResidentError."""
        with self._lock:
            resident = self._books.find(version)
            if resident is None:
                raise NotResidentError(f"adapter {version} is not resident")
            return self._books.pages_of(resident)

    # Coming and going.

    def load(self, version: AdapterVersion, rows: AdapterRows) -> int:
        """Bring an adapter to the device, evicting idle unpinned ones as `eviction.py` says.

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
            self.modules[path].check_shapes(path, module_rows)
            if module_rows.magnitude_O is not None and self._base_weight is None:
                raise AdapterRefusedError(
                    f"{path} has a magnitude (DoRA), and this bank has no base weights to measure it by",
                    param=path,
                )
        check_finite(rows.modules, self.dtype)
        modules = {path: self.modules[path].effective(one) for path, one in rows.modules.items()}
        rows = replace(rows, modules=modules)
        layouts = {path: ModuleLayout.of(modules.get(path)) for path in self.modules}
        with self._lock:
            known = self._books.find(version)
            if known is not None and known.is_ready:
                return known.slot
            if known is not None:
                raise BankBusyError(f"adapter {version} is being loaded by another thread")
            resident = self._books.admit(version, layouts)
            places = self._books.pages_of(resident)
        try:
            self._write(rows, places)
            self._publish(resident)
        except BaseException:
            with self._lock:
                self._books.remove(resident)
            raise
        return resident.slot

    def _write(self, rows: AdapterRows, places: Mapping[str, SlotPages]) -> None:
        """Copy an adapter's rows into its pages, which nobody else looks at until they are published."""
        with torch.no_grad(), self._transfer.copying():
            # Modules of a group have the same pages, and making an index takes as long as copying a row.
            index_of: dict[tuple[int, ...], Tensor] = {}
            for path, module_rows in rows.modules.items():
                measured = self._measured(path, module_rows)
                for bank_rows, pages, values in self.modules[path].writes(measured, places[path]):
                    if pages not in index_of:
                        index_of[pages] = self._transfer.to_device(torch.tensor(pages))
                    there = self._transfer.to_device(values, bank_rows.dtype)
                    bank_rows.index_copy_(0, index_of[pages], there)

    def _publish(self, newcomer: Resident | None = None) -> None:
        """Make tables of all that is ready the current ones, and then let `newcomer`, which is in them, be used."""
        with self._publishing:
            with self._lock:
                groups = self._books.pages_by_group(newcomer)
            with self._transfer.copying():
                table_of = {
                    path: table
                    for modules, pages in groups
                    for table in [GroupTable.build(pages, self.num_slots, self._transfer.to_device)]
                    for path in modules
                }
                copied = self._transfer.mark()
            self._snapshot = BankSnapshot(table_of, copied)
            if newcomer is not None:
                with self._lock:
                    self._books.make_ready(newcomer)
                    self._num_loads += 1

    def _measured(self, path: str, rows: ModuleRows) -> ModuleRows:
        """The rows as the device knows them: with no magnitude."""
        if rows.magnitude_O is None or self._base_weight is None:
            return rows
        measured = with_scale(path, rows, self._base_weight(path))
        check_finite({path: measured}, self.dtype)
        return measured

    def evict(self, version: AdapterVersion) -> None:
        """Free an idle adapter's rows. Raises BankBusyError while it is in use; no error when it is not here."""
        with self._lock:
            resident = self._books.find(version)
            if resident is None:
                return
            if resident.references or not resident.is_ready:
                raise BankBusyError(f"adapter {version} is in use")
            self._books.evict(resident)
        self._publish()

    def pin(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep exactly these from eviction, whether they are resident yet or not."""
        with self._locked():
            self._books.pin(versions)

    def check_integrity(self) -> bool:
        """Every page and slot has one owner or none, every reference a resident, and the tables name what is ready."""
        with self._publishing, self._lock:
            pages_of = {
                path: pages for modules, pages in self._books.pages_by_group() for path in modules
            }
            shown = {path: table.pages for path, table in self._snapshot.table_of.items()}
            return self._books.check_integrity() and all(
                pages.items() <= shown[path].items() for path, pages in pages_of.items()
            )

    def _locked(self) -> AbstractContextManager[None]:
        """The books' lock, in methods that the thread that steps calls."""
        return self.waits.holding(self._lock)
