"""Where each adapter's rows lie in the blocks of a bank, and in what order. Knows numbers of rows, not their values."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.derived_rows import MagnitudePlaces
from workers.bank.layout import SlotPages


@dataclass(slots=True)
class Place:
    """One adapter's slot and pages, with its rows by width.

    Attributes:
        magnitudes: DoRA's, by projection.
        trained: what the optimizer changes; `owned` has what is only read too.
    """

    slot: int
    pages: Mapping[str, SlotPages]
    magnitudes: dict[str, MagnitudePlaces] = field(default_factory=dict)
    trained: dict[int, Tensor] = field(default_factory=dict)
    owned: dict[int, Tensor] = field(default_factory=dict)


class RowPlaces:
    """The rows of all blocks.

    Args:
        first: a projection's path and side (in, out) → the width of its block, and where its pages begin there.
        num_rows: of each block, by its width.
        apart: how many of them lie behind the bank's, for what DoRA trains.
    """

    def __init__(
        self,
        first: Mapping[tuple[str, str], tuple[int, int]],
        num_rows: Mapping[int, int],
        apart: Mapping[int, int],
    ) -> None:
        self._first = first
        self._apart = {
            width: range(count - apart.get(width, 0), count) for width, count in num_rows.items()
        }
        self._free_apart = {width: list(rows) for width, rows in self._apart.items()}

    def width(self, path: str, side: str) -> int:
        return self._first[path, side][0]

    def rows(self, path: str, side: str, pages: Iterable[int]) -> tuple[int, ...]:
        """Pages of one projection's side as rows of their block."""
        return tuple(self._first[path, side][1] + page for page in pages)

    def claim(self, slot: int, pages: Mapping[str, SlotPages]) -> Place:
        """A place with its rows, in an order that does not depend on who else is here."""
        place = Place(slot, pages)
        trained: dict[int, list[int]] = {}
        read: dict[int, list[int]] = {}
        for path, own in sorted(pages.items()):
            ins, outs = self.rows(path, "in", own.in_pages), self.rows(path, "out", own.out_pages)
            only_read: tuple[int, ...] = ()
            if own.layout.has_scale and own.layout.num_add:
                magnitude = self._claim_apart(path, own)
                place.magnitudes[path] = magnitude
                only_read, outs = outs, (*magnitude.q, magnitude.magnitude)
            elif own.layout.has_bias:
                only_read, outs = self.rows(path, "out", (own.bias,)), outs[:-1]
            trained.setdefault(self.width(path, "in"), []).extend(ins)
            trained.setdefault(self.width(path, "out"), []).extend(outs)
            read.setdefault(self.width(path, "out"), []).extend(only_read)
        for width, rows in trained.items():
            if rows:
                place.trained[width] = torch.tensor(rows)
                place.owned[width] = torch.tensor(rows + read.get(width, []))
        return place

    def give_back(self, place: Place) -> None:
        """What `claim` took behind the bank's rows; the bank's own are its pages."""
        for path, magnitude in place.magnitudes.items():
            for row in (*magnitude.q, magnitude.magnitude):
                heapq.heappush(self._free_apart[self.width(path, "out")], row)

    def is_whole(self, places: Iterable[Place]) -> bool:
        """These are all there are: no row is in two of them, and those behind the bank's are free or in one."""
        places = list(places)
        for width, apart in self._apart.items():
            taken = list(self._free_apart[width])
            for place in places:
                taken += place.owned.get(width, torch.empty(0)).tolist()
            if len(set(taken)) != len(taken) or not set(apart) <= set(taken):
                return False
        return True

    def _claim_apart(self, path: str, pages: SlotPages) -> MagnitudePlaces:
        """Take rows behind the bank's for what DoRA trains in a projection."""
        free = self._free_apart[self.width(path, "out")]
        return MagnitudePlaces(
            p=self.rows(path, "in", pages.add_in),
            q=tuple(heapq.heappop(free) for _ in pages.add_out),
            read_q=self.rows(path, "out", pages.add_out),
            magnitude=heapq.heappop(free),
            read_scale=self.rows(path, "out", (pages.scale,))[0],
            gate=pages.layout.add_gate,
        )
