"""Decode steps replayed from recorded GPU graphs: the host's part of a step is then three copies and one launch.

A graph has fixed shapes and fixed addresses. So a step is padded to the next larger shape with tokens of nobody (they
read no rows, see no keys, and write to a page that is nobody's), and everything that differs from step to step lies in
buffers that are written before the replay. A step that is not one new token of every sequence is not taken: the
runner computes it as ever.

Knows nothing of CUDA but in `GpuRecorder`; a recorder that runs the step again instead gives the same logits.

Shape legend: T tokens in the step, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.pages import PagedAttention, PageLayout
from workers.bank.bank import BankSnapshot
from workers.bank.groups import GroupTable
from workers.kernels.step_tables import (
    HostTables,
    decode_capacity,
    look_up,
)
from workers.models.runner import StepInput
from workers.row_form.adapted_linear import AdapterLayers
from workers.row_form.cost import KERNEL_COST
from workers.row_form.step_plan import SlotRun, StepPlan

MAX_GRAPHS = 64
"""Recorded shapes that are kept; the one least recently used goes first."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a graph has room for in one module group, by token of the padded batch."""

    rows_per_token: int
    dots_per_token: int
    stacks_rows: bool
    has_long: bool
    is_plain: bool


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What decides whether a recorded graph fits a step."""

    batch: int
    blocks: int
    groups: tuple[GroupShape, ...]  # none: no token has an adapter
    group_of_path: tuple[int, ...]


class Recorder(Protocol):
    """Records the launches of `run`, whose tensors keep their addresses, and returns what replays them."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


class GpuRecorder:
    """CUDA graphs that share one memory pool: a replay's result is valid until the next replay."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles and loads every kernel, which cannot be done while recording
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Adapters may be loaded by other threads meanwhile: what they do is not part of this.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(slots=True)
class _Recording:
    """One graph and the buffers it reads."""

    layout: PageLayout
    token_ids_T: Tensor
    positions_T: Tensor
    wanted_L: Tensor  # every token's logits
    pages: Tensor
    tables: list[Tensor]  # by group; empty where it is plain
    replay: Callable[[], Tensor]
    holds: tuple[tuple[SlotRun, ...], BankSnapshot | None] | None = None  # what `tables` say


class DecodeGraphs:
    """See the module's docstring. One thread at a time, like the runner it belongs to.

    Args:
        logits: computes logits_TV of token ids and positions at all of their positions, over `attention` and `layers`.
    """

    def __init__(
        self,
        logits: Callable[[Tensor, Tensor, Tensor], Tensor],
        attention: PagedAttention,
        layers: AdapterLayers,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self._logits = logits
        self._attention = attention
        self._layers = layers
        self._recorder = recorder
        self._device = device
        self._recordings: OrderedDict[DecodeShape, _Recording] = OrderedDict()
        self._last: (
            tuple[tuple[tuple[SlotRun, ...], int, BankSnapshot | None], list[HostTables]] | None
        ) = None

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def logits(self, step: StepInput) -> Tensor | None:
        """logits_TV of a decode step, valid until the next call; None if it is none, or does not fit a graph."""
        count = len(step.spans)
        if len(step.logits_of_L) != count or any(span.num_new != 1 for span in step.spans):
            return None
        snapshot = None if step.plan.is_base_only else self._layers.snapshot
        if snapshot is None and not step.plan.is_base_only:
            return None
        batch = batch_bucket(count)
        groups = _groups(snapshot)
        hosts = self._looked_up(step.plan, batch, snapshot, groups)
        if not all(_fits(host) for host in hosts):
            return None
        blocks = max(-(-span.num_total // self._attention.block_tokens) for span in step.spans)
        shape = DecodeShape(
            batch=batch,
            blocks=_power_of_two(max(16, blocks)),
            groups=tuple(_group_shape(host, batch) for host in hosts),
            group_of_path=tuple(groups[table] for table in snapshot.table_of.values())
            if snapshot
            else (),
        )
        recording = self._recordings.get(shape)
        fresh = recording is None
        if recording is None:
            recording = self._prepare(shape)
        self._fill(recording, shape, step, hosts, snapshot)
        if fresh:
            recording.replay = self._record(recording, shape, hosts, snapshot)
            self._recordings[shape] = recording
            if len(self._recordings) > MAX_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(shape)
        return recording.replay()[:count]

    def _looked_up(
        self,
        plan: StepPlan,
        batch: int,
        snapshot: BankSnapshot | None,
        groups: Iterable[GroupTable],
    ) -> list[HostTables]:
        """The tables of a step, padded; those of the last step while the same sequences decode."""
        about = (plan.runs, batch, snapshot)
        if self._last is None or self._last[0] != about:
            padded = replace(plan, num_tokens=batch)
            self._last = (about, [look_up(padded, table, KERNEL_COST) for table in groups])
        return self._last[1]

    def _prepare(self, shape: DecodeShape) -> _Recording:
        layout = PageLayout(
            tokens=shape.batch,
            sequences=shape.batch,
            blocks=shape.blocks,
            singles=shape.batch,
            tiles=0,
            max_length=shape.blocks * self._attention.block_tokens,
        )
        return _Recording(
            layout=layout,
            token_ids_T=torch.zeros(shape.batch, dtype=torch.int64, device=self._device),
            positions_T=torch.zeros(shape.batch, dtype=torch.int64, device=self._device),
            wanted_L=torch.arange(shape.batch, device=self._device),
            pages=torch.empty(0, dtype=torch.int32, device=self._device),
            tables=[],
            replay=_nothing,
        )

    def _fill(
        self,
        recording: _Recording,
        shape: DecodeShape,
        step: StepInput,
        hosts: list[HostTables],
        snapshot: BankSnapshot | None,
    ) -> None:
        count = len(step.spans)
        recording.token_ids_T[:count].copy_(step.token_ids_T)
        recording.positions_T[:count].copy_(step.positions_T)
        self._attention.check(step.spans)
        pages = self._attention.pack(step.spans, recording.layout)
        recording.pages = self._written(recording.pages, pages)
        # While the same sequences decode, step after step has the same tables.
        holds = (step.plan.runs, snapshot)
        if recording.holds is not None and recording.holds == holds:
            return
        recording.holds = holds
        tables = recording.tables or [recording.pages.new_empty(0) for _ in hosts]
        recording.tables = [
            table
            if group.is_plain
            else self._written(table, host.packed(_capacity(shape.batch, group)))
            for table, host, group in zip(tables, hosts, shape.groups, strict=True)
        ]

    def _written(self, buffer: Tensor, words: npt.NDArray[np.int32]) -> Tensor:
        """The words in the buffer, or in a new one where it has none yet."""
        source = torch.from_numpy(words)
        if not len(buffer):
            return source.to(self._device)
        return buffer.copy_(source, non_blocking=True)

    def _record(
        self,
        recording: _Recording,
        shape: DecodeShape,
        hosts: list[HostTables],
        snapshot: BankSnapshot | None,
    ) -> Callable[[], Tensor]:
        indices = []
        for host, buffer, group in zip(hosts, recording.tables, shape.groups, strict=True):
            tables = (
                HostTables(0).on(buffer, decode_capacity(0, 0, 0, has_long=False))
                if group.is_plain
                else host.on(buffer, _capacity(shape.batch, group))
            )
            indices.append(replace(tables, num_dots=shape.batch * group.dots_per_token))
        page_step = recording.layout.views(recording.pages)

        def run() -> Tensor:
            self._attention.step = page_step
            if snapshot is None:
                self._layers.begin_step(None)
            else:
                self._layers.begin_step_given(
                    dict(
                        zip(
                            snapshot.table_of,
                            (indices[number] for number in shape.group_of_path),
                            strict=True,
                        )
                    )
                )
            return self._logits(recording.token_ids_T, recording.positions_T, recording.wanted_L)

        return self._recorder(run)


def batch_bucket(count: int) -> int:
    """The padded number of sequences: powers of two, from 16 on multiples of 16."""
    return _power_of_two(count) if count <= 16 else -(-count // 16) * 16


def _groups(snapshot: BankSnapshot | None) -> dict[GroupTable, int]:
    """Numbers of the module groups, in the order of their first module."""
    numbers: dict[GroupTable, int] = {}
    for table in () if snapshot is None else snapshot.table_of.values():
        numbers.setdefault(table, len(numbers))
    return numbers


def _fits(host: HostTables) -> bool:
    """Without mul rows the library's product runs over all tokens; a graph cannot leave some of them out."""
    whole = host.stacks_rows or host.row_token == list(range(host.num_tokens))
    return whole and not host.weight and not host.dot_long


def _group_shape(host: HostTables, batch: int) -> GroupShape:
    if host.is_plain:
        return GroupShape(0, 0, stacks_rows=False, has_long=False, is_plain=True)
    return GroupShape(
        rows_per_token=_power_of_two(-(-len(host.row_token) // batch)) if host.stacks_rows else 1,
        dots_per_token=_power_of_two(-(-host.num_dots // batch)) if host.num_dots else 0,
        stacks_rows=host.stacks_rows,
        has_long=bool(host.sum_long),
        is_plain=False,
    )


def _capacity(batch: int, group: GroupShape) -> dict[str, int]:
    return decode_capacity(
        batch, group.rows_per_token, group.dots_per_token, has_long=group.has_long
    )


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _nothing() -> Tensor:
    raise RuntimeError("nothing is recorded yet")
