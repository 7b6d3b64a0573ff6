"""One step's rows in one module group, as the kernels read them: looked up on the host, sent to the device in one copy.

A decode step looks up a few hundred numbers; doing that with device operations would cost more launches than the layer
itself. Nothing here waits for the device, and everything a kernel is told beyond shapes lies in one buffer of 32-bit
words, so a captured graph replays with the next step's rows by copying the next step's buffer over it.

How a run of tokens is computed depends on its own length and ranks only, never on its neighbours: up to
`SHORT_RUN` tokens one by one, longer runs in tiles for the matrix unit, and where the cost model prefers it in weight
mode.

Shape legend: T tokens in the step, R rows of the stacked product, F page numbers, J tiles of C columns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.bank.groups import GroupTable
from workers.bank.layout import SlotPages
from workers.bank.pages import NULL_PAGE
from workers.row_form.cost import CostModel
from workers.row_form.step_plan import SlotRun, StepPlan

NO_PAGE = -1
"""Instead of a page number: the base row, an output that is neither scaled nor shifted."""

NO_TOKEN = -1
"""The token of a row that is there only to fill a buffer."""

SHORT_RUN = 8
LONG_TILE_TOKENS = 32
WEIGHT_TILE_TOKENS = 128

TILE_COLUMNS = (
    "first_token",
    "num_tokens",  # 0: a tile that is there only to fill a buffer
    "first_row",  # of the stacked product
    "num_rows",  # of each token; in weight mode: mul rows of the adapter
    "in_pages",  # where in `page_F` the mul rows' input sides stand; weight mode
    "out_pages",  # the same for output sides, NO_PAGE for the base row
    "first_dot",
    "num_add",
    "add_in_pages",
    "add_out_pages",
    "scale_page",
    "bias_page",
    "gate",  # the bits of a float32
    "shift",  # the bits of a float32; weight mode: what is added to Σ a_j b_jᵀ
)
TILE_WORDS = 16

_SECTIONS = (
    "row_token_R", "row_page_R", "page_F", "sum_short_JC", "sum_long_JC", "dot_short_JC", "dot_long_JC", "weight_JC"
)  # fmt: skip
_ALIGN_WORDS = 16


@dataclass(frozen=True, slots=True)
class StepTables:
    """Where the kernels find everything; the counterpart of `ModuleIndex`. Tensors are int32 on the model's device.

    `sum_*` tiles gather each token's rows and write its output, `dot_*` tiles compute the dots x · p of add rows, and
    `weight` tiles do both and their own product. Every token of the step is in one `sum` or `weight` tile.
    """

    row_token_R: Tensor  # ascending; a token's rows are neighbours, the base row first
    row_page_R: Tensor  # input-side page, NO_PAGE for a base row
    page_F: Tensor
    sum_short_JC: Tensor
    sum_long_JC: Tensor
    dot_short_JC: Tensor
    dot_long_JC: Tensor
    weight_JC: Tensor
    num_dots: int
    num_tokens: int
    max_mul: int  # of the runs in weight mode
    stacks_rows: bool  # some rows are mul rows: the base rows then go through the same product
    rows_are_tokens: bool  # row i is token i
    is_plain: bool  # no adapter of this step touches these modules

    @property
    def has_mul_rows(self) -> bool:
        """Some tokens' outputs are other products with W0 than the base's."""
        return self.stacks_rows or not self.rows_are_tokens


@dataclass(slots=True)
class HostTables:
    """The same on the host, while it is made."""

    num_tokens: int
    row_token: list[int] = field(default_factory=list)
    row_page: list[int] = field(default_factory=list)
    page: list[int] = field(default_factory=list)
    sum_short: list[list[int]] = field(default_factory=list)
    sum_long: list[list[int]] = field(default_factory=list)
    dot_short: list[list[int]] = field(default_factory=list)
    dot_long: list[list[int]] = field(default_factory=list)
    weight: list[list[int]] = field(default_factory=list)
    num_dots: int = 0
    max_mul: int = 0
    stacks_rows: bool = False
    is_plain: bool = True

    def _sections(self) -> Iterator[npt.NDArray[np.int32]]:
        for values in (self.row_token, self.row_page, self.page):
            yield np.array(values, dtype=np.int32)
        for tiles in (self.sum_short, self.sum_long, self.dot_short, self.dot_long, self.weight):
            rows = np.zeros((len(tiles), TILE_WORDS), dtype=np.int32)
            if tiles:
                rows[:, : len(TILE_COLUMNS)] = tiles
            yield rows

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of each section."""
        return {name: len(words) for name, words in zip(_SECTIONS, self._sections(), strict=True)}

    def packed(self, capacity: dict[str, int]) -> npt.NDArray[np.int32]:
        """One buffer with `capacity` entries of each section; the rest are rows and tiles of nothing.

        Raises:
            ValueError: a section holds more than its capacity.
        """
        pieces: list[npt.NDArray[np.int32]] = []
        for name, words in zip(_SECTIONS, self._sections(), strict=True):
            if len(words) > capacity[name]:
                raise ValueError(f"{len(words)} entries of {name} in room for {capacity[name]}")
            fill = NO_TOKEN if name == "row_token_R" else 0
            room = np.full((_words(name, capacity[name]),), fill, dtype=np.int32)
            room[: words.size] = words.reshape(-1)
            pieces.append(room)
        return np.concatenate(pieces)

    def on(self, buffer: Tensor, capacity: dict[str, int]) -> StepTables:
        """Tables that are views of a device buffer laid out by `packed(capacity)`."""
        views: dict[str, Tensor] = {}
        start = 0
        for name in _SECTIONS:
            count = capacity[name]
            if name.endswith("_JC"):
                views[name] = buffer[start : start + count * TILE_WORDS].view(count, TILE_WORDS)
            else:
                views[name] = buffer[start : start + count]
            start += _words(name, count)
        return StepTables(
            **views,
            num_dots=self.num_dots,
            num_tokens=self.num_tokens,
            max_mul=self.max_mul,
            stacks_rows=self.stacks_rows,
            rows_are_tokens=self.row_token == list(range(self.num_tokens)),
            is_plain=self.is_plain,
        )


def decode_capacity(
    num_tokens: int, rows_per_token: int, dots_per_token: int, *, has_long: bool
) -> dict[str, int]:
    """Room for any step of `num_tokens` runs of one token each, within so many rows and dots.

    Args:
        has_long: base tokens may stand side by side and make long runs.
    """
    rows, dots = num_tokens * rows_per_token, num_tokens * dots_per_token
    return {
        "row_token_R": rows,
        "row_page_R": rows,
        "page_F": 2 * (rows + dots) + num_tokens + 1,
        "sum_short_JC": num_tokens,
        "sum_long_JC": num_tokens // SHORT_RUN if has_long else 0,
        "dot_short_JC": num_tokens if dots else 0,
        "dot_long_JC": 0,
        "weight_JC": 0,
    }


def index_for_kernels(plan: StepPlan, table: GroupTable, cost: CostModel) -> StepTables:
    """`index_module_group` for the kernels. Host time grows with runs and rows; no host sync."""
    host = look_up(plan, table, cost)
    sizes = host.sizes
    buffer = torch.from_numpy(host.packed(sizes)).to(plan.device, non_blocking=True)
    return host.on(buffer, sizes)


def look_up(plan: StepPlan, table: GroupTable, cost: CostModel) -> HostTables:
    """Which bank rows meet which tokens, run by run; base tokens between the runs are runs of their own."""
    host = HostTables(plan.num_tokens)
    places: dict[int, _Places] = {}
    base = _Places.of(host, None)
    token = 0
    for run in plan.runs:
        _add_run(host, base, token, run.start - token, 1.0, is_weight=False)
        place = places.get(run.slot)
        if place is None:
            place = places[run.slot] = _Places.of(host, table.pages[run.slot])
        is_weight = cost.prefers_weight_mode(run.num_tokens, place.num_mul, place.offset)
        _add_run(host, place, run.start, run.num_tokens, _gate(run, place), is_weight=is_weight)
        host.is_plain &= place.is_plain
        token = run.start + run.num_tokens
    _add_run(host, base, token, plan.num_tokens - token, 1.0, is_weight=False)
    return host


@dataclass(frozen=True, slots=True)
class _Places:
    """One adapter's page numbers, and where they stand in `page_F`."""

    mul_in: tuple[int, ...] = ()
    num_mul: int = 0
    offset: int = 1
    num_add: int = 0
    add_gate: float = 1.0
    scale_page: int = NO_PAGE
    bias_page: int = NO_PAGE
    in_pages: int = 0
    out_pages: int = 0  # of the base row, where there is one
    add_in_pages: int = 0
    add_out_pages: int = 0

    @classmethod
    def of(cls, host: HostTables, pages: SlotPages | None) -> _Places:
        first = len(host.page)
        if pages is None:
            host.page.append(NO_PAGE)
            return cls(out_pages=first)
        offset = pages.layout.offset
        host.page += [*pages.mul_in, *[NO_PAGE] * offset, *pages.mul_out]
        host.page += [*pages.add_in, *pages.add_out]
        num_mul, num_add = len(pages.mul_in), len(pages.add_in)
        return cls(
            mul_in=pages.mul_in,
            num_mul=num_mul,
            offset=offset,
            num_add=num_add,
            add_gate=pages.layout.add_gate,
            scale_page=NO_PAGE if pages.scale == NULL_PAGE else pages.scale,
            bias_page=NO_PAGE if pages.bias == NULL_PAGE else pages.bias,
            in_pages=first,
            out_pages=first + num_mul,
            add_in_pages=first + num_mul + offset + num_mul,
            add_out_pages=first + num_mul + offset + num_mul + num_add,
        )

    @property
    def is_plain(self) -> bool:
        return (
            self.offset == 1
            and not self.num_mul
            and not self.num_add
            and self.scale_page == NO_PAGE
            and self.bias_page == NO_PAGE
        )


def _add_run(
    host: HostTables, place: _Places, start: int, num_tokens: int, gate: float, *, is_weight: bool
) -> None:
    if num_tokens == 0:
        return
    num_rows = place.num_mul if is_weight else place.offset + place.num_mul
    run = _Run(host, place, start, num_rows, gate)
    # rows
    if is_weight:
        host.max_mul = max(host.max_mul, place.num_mul)
        host.weight += run.tiles(
            num_tokens, WEIGHT_TILE_TOKENS, out_pages=place.out_pages + place.offset
        )
    else:
        host.stacks_rows |= place.num_mul > 0
        host.row_token += [
            token for token in range(start, start + num_tokens) for _ in range(num_rows)
        ]
        host.row_page += [*[NO_PAGE] * place.offset, *place.mul_in] * num_tokens
        if num_tokens <= SHORT_RUN:
            host.sum_short += run.tiles(num_tokens, 1)
        else:
            host.sum_long += run.tiles(num_tokens, LONG_TILE_TOKENS)
    # dots
    if place.num_add:
        if num_tokens <= SHORT_RUN:
            host.dot_short += run.tiles(num_tokens, 1)
        else:
            host.dot_long += run.tiles(num_tokens, LONG_TILE_TOKENS)
    host.num_dots += num_tokens * place.num_add


class _Run:
    """Makes the tiles of one run; its rows and dots follow what the host has now."""

    def __init__(
        self, host: HostTables, place: _Places, start: int, num_rows: int, gate: float
    ) -> None:
        self._place, self._start, self._num_rows, self._gate = place, start, num_rows, gate
        self._first_row, self._first_dot = len(host.row_token), host.num_dots

    def tiles(
        self, num_tokens: int, tile_tokens: int, out_pages: int | None = None
    ) -> list[list[int]]:
        place = self._place
        return [
            [
                self._start + first,
                min(tile_tokens, num_tokens - first),
                self._first_row + first * self._num_rows,
                self._num_rows,
                place.in_pages,
                place.out_pages if out_pages is None else out_pages,
                self._first_dot + first * place.num_add,
                place.num_add,
                place.add_in_pages,
                place.add_out_pages,
                place.scale_page,
                place.bias_page,
                _bits(self._gate),
                _bits(float(place.offset - 1)),
            ]
            for first in range(0, num_tokens, tile_tokens)
        ]


def _gate(run: SlotRun, place: _Places) -> float:
    return run.gate * place.add_gate


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _words(name: str, count: int) -> int:
    words = count * (TILE_WORDS if name.endswith("_JC") else 1)
    return -(-words // _ALIGN_WORDS) * _ALIGN_WORDS
