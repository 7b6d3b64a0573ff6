"""Modules that see the same layout share one page map, so a step looks their rows up once.

A group begins as all modules. An adapter whose ranks differ from module to module splits it; the parts never merge
while the bank holds anything, because their pages may differ from then on.

Shape legend: S bank slots, F pages of all slots of a group, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.bank.layout import ModuleLayout, SlotPages
from workers.bank.pages import NULL_PAGE, PageAllocator


@dataclass(frozen=True)
class PageLists:
    """For each slot a list of (in page, out page) pairs, flattened."""

    first_S: Tensor  # int64
    count_S: Tensor  # int64
    in_page_F: Tensor  # int64
    out_page_F: Tensor  # int64
    counts: Mapping[int, int]  # count_S on the host, for slots that have any

    @classmethod
    def build(
        cls,
        pairs: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]],
        num_slots: int,
        to_device: Callable[[Tensor], Tensor],
    ) -> PageLists:
        counts = {slot: len(ins) for slot, (ins, _) in pairs.items() if ins}
        first, count = [0] * num_slots, [0] * num_slots
        flat_in: list[int] = []
        flat_out: list[int] = []
        for slot, (ins, outs) in pairs.items():
            first[slot], count[slot] = len(flat_in), len(ins)
            flat_in.extend(ins)
            flat_out.extend(outs)
        return cls(
            first_S=to_device(torch.tensor(first)),
            count_S=to_device(torch.tensor(count)),
            in_page_F=to_device(torch.tensor(flat_in, dtype=torch.int64)),
            out_page_F=to_device(torch.tensor(flat_out, dtype=torch.int64)),
            counts=counts,
        )


@dataclass(frozen=True, eq=False)
class GroupTable:
    """A snapshot of one group, on the device. Never changed: a load makes a new one, a step keeps its own."""

    mul: PageLists
    add: PageLists
    add_gate_S: Tensor  # float32
    scale_page_S: Tensor  # int64, an output-side page, of c − 1
    bias_page_S: Tensor  # int64, an output-side page, of bias' − bias
    pages: Mapping[int, SlotPages]  # the same on the host

    @classmethod
    def build(
        cls,
        pages: Mapping[int, SlotPages],
        num_slots: int,
        to_device: Callable[[Tensor], Tensor],
    ) -> GroupTable:
        """Of the slots in `pages`; the others change nothing."""
        gate = [1.0] * num_slots
        scale, bias = [NULL_PAGE] * num_slots, [NULL_PAGE] * num_slots
        for slot, taken in pages.items():
            gate[slot] = taken.layout.add_gate
            scale[slot], bias[slot] = taken.scale, taken.bias
        mul = {slot: (taken.mul_in, taken.mul_out) for slot, taken in pages.items()}
        add = {slot: (taken.add_in, taken.add_out) for slot, taken in pages.items()}
        return cls(
            mul=PageLists.build(mul, num_slots, to_device),
            add=PageLists.build(add, num_slots, to_device),
            add_gate_S=to_device(torch.tensor(gate, dtype=torch.float32)),
            scale_page_S=to_device(torch.tensor(scale)),
            bias_page_S=to_device(torch.tensor(bias)),
            pages=pages,
        )

    def tensors(self) -> Iterator[Tensor]:
        """All that lies on the device."""
        yield from (self.add_gate_S, self.scale_page_S, self.bias_page_S)
        for lists in (self.mul, self.add):
            yield from (lists.first_S, lists.count_S, lists.in_page_F, lists.out_page_F)


class ModuleGroup:
    """Modules with one common page map. Not thread-safe: the bank's lock guards it."""

    def __init__(self, modules: tuple[str, ...], ins: PageAllocator, outs: PageAllocator) -> None:
        self.modules = modules
        self.ins = ins
        self.outs = outs
        self.slots: dict[int, SlotPages] = {}

    def split(self, layouts: Mapping[str, ModuleLayout]) -> list[ModuleGroup]:
        """This group, divided by the layout an incoming adapter has in each module; itself when they agree."""
        parts: dict[ModuleLayout, list[str]] = {}
        for module in self.modules:
            parts.setdefault(layouts[module], []).append(module)
        if len(parts) == 1:
            return [self]
        groups = []
        for modules in parts.values():
            group = ModuleGroup(tuple(modules), self.ins.clone(), self.outs.clone())
            group.slots = dict(self.slots)
            groups.append(group)
        return groups

    def allocate(self, slot: int, layout: ModuleLayout) -> None:
        self.slots[slot] = SlotPages.allocate(layout, self.ins, self.outs)

    def free(self, slot: int) -> None:
        pages = self.slots.pop(slot)
        self.ins.free(pages.in_pages)
        self.outs.free(pages.out_pages)

    @property
    def rows_used(self) -> int:
        """Pages taken on the fuller side."""
        return max(side.num_pages - side.num_free for side in (self.ins, self.outs))

    def check_integrity(self) -> bool:
        """Every page has exactly one owner or none."""
        ins = [page for taken in self.slots.values() for page in taken.in_pages]
        outs = [page for taken in self.slots.values() for page in taken.out_pages]
        return self.ins.check_integrity(ins) and self.outs.check_integrity(outs)


class GroupRoom:
    """Whether a layout fits a group, asked before anything is evicted for it."""

    def __init__(self, group: ModuleGroup, layout: ModuleLayout) -> None:
        self._group = group
        self._short_in = layout.num_in - group.ins.num_free
        self._short_out = layout.num_out - group.outs.num_free

    def without(self, slot: int) -> None:
        """Count the pages of one more adapter as free."""
        self._short_in -= len(self._group.slots[slot].in_pages)
        self._short_out -= len(self._group.slots[slot].out_pages)

    @property
    def is_enough(self) -> bool:
        return self._short_in <= 0 and self._short_out <= 0
