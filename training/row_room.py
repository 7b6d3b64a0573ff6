"""How many rows a set of adapters takes while at most so many of them train at once. Numbers only, no tensor.

Shape legend: I input features, O output features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

from workers.bank.layout import ModuleLayout
from workers.bank.pages import NUM_RESERVED

RowLayouts = Mapping[str, ModuleLayout]
"""One adapter's shape in every projection it touches."""


@dataclass(frozen=True, slots=True)
class RowRoom:
    """Room for any `max_resident` of the adapters it was made for.

    `num_pages`: of every projection, without the reserved ones. `apart`: rows by width that DoRA trains and no layer
    reads.
    """

    num_pages: int
    apart: Mapping[int, int]

    @classmethod
    def of(
        cls,
        adapters: Sequence[RowLayouts],
        projections: Mapping[str, tuple[int, int]],
        max_resident: int,
    ) -> RowRoom:
        pages: dict[str, list[int]] = {}
        apart: dict[int, list[int]] = {}
        for layouts in adapters:
            for path, layout in layouts.items():
                pages.setdefault(path, []).append(max(layout.num_in, layout.num_out))
            for width, count in rows_apart(layouts, projections).items():
                apart.setdefault(width, []).append(count)
        return cls(
            max((_largest(counts, max_resident) for counts in pages.values()), default=0),
            {width: _largest(counts, max_resident) for width, counts in apart.items()},
        )

    def numbers(self, projections: Mapping[str, tuple[int, int]]) -> dict[int, int]:
        """How many numbers one tensor of all rows has, by width."""
        count: Counter[int] = Counter()
        for sides in projections.values():
            for width in sides:
                count[width] += (self.num_pages + NUM_RESERVED) * width
        for width, rows in self.apart.items():
            count[width] += rows * width
        return dict(count)


def rows_apart(layouts: RowLayouts, projections: Mapping[str, tuple[int, int]]) -> Counter[int]:
    """By width, the rows DoRA trains that no layer reads: its q and its magnitude."""
    apart: Counter[int] = Counter()
    for path, layout in layouts.items():
        if layout.has_scale and layout.num_add:
            apart[projections[path][1]] += layout.num_add + 1
    return apart


def _largest(counts: Iterable[int], how_many: int) -> int:
    return sum(nlargest(how_many, counts))
