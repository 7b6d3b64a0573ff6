"""Decode steps through recorded buffers give the answers of the runner itself.

The recorder here runs a step's launches again at every replay, as a graph would on a GPU: what is not in the recorded
buffers cannot change an answer. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import random_adapter
from tests.workers.models.test_hf import tiny
from workers.attention import building
from workers.attention.pages import PagedAttention
from workers.bank.bank import AdapterBank
from workers.config import EngineSettings
from workers.models.arithmetic import kernel_arithmetic
from workers.models.decode_graphs import batch_bucket
from workers.models.loading import LoadedBase
from workers.models.native.runner import NativeRunner
from workers.models.runner import SequenceSpan, StepInput
from workers.row_form.step_plan import Segment, plan_step

CPU = torch.device("cpu")
FLORA, OTHER, LORA, PART = (AdapterVersion(f"{number:064x}") for number in range(4))


@contextmanager
def nothing_live() -> Iterator[None]:
    """A graph replays launches: nothing is looked up while it is recorded, nor when it is replayed."""

    def refuse(*_: object) -> None:
        raise AssertionError("a graph cannot look this up")

    with (
        mock.patch.object(AdapterBank, "snapshot", property(refuse)),
        mock.patch.object(PagedAttention, "begin_step", refuse),
    ):
        yield


class Again:
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            with nothing_live():
                return run()

        return replay


class Side:
    """A runner over pages; sequences keep their blocks and lengths."""

    def __init__(self, recorder: Again | None) -> None:
        model = tiny(LlamaConfig, torch.float32, num_hidden_layers=1)
        settings = EngineSettings(
            max_sequences=24, max_sequence_tokens=64, kv_block_tokens=4, dtype="float32"
        )
        self.runner = NativeRunner(
            LoadedBase(model, "0" * 64, Path("nowhere")), settings, kernel_arithmetic()
        )
        if recorder is not None:
            self.runner.use_graphs(recorder)
        shapes = self.runner.shape.projections
        self.bank = AdapterBank(
            shapes, num_rows=32, num_slots=4, dtype=torch.float32, device=CPU,
            base_weight=self.runner.base_weight,
        )  # fmt: skip
        self.runner.bind(self.bank)
        self.bank.load(FLORA, random_adapter(shapes, "flora", 2, seed=1))
        self.bank.load(OTHER, random_adapter(shapes, "flora", 1, seed=2))
        self.bank.load(LORA, random_adapter(shapes, "lora", 3, seed=3))
        self.cached = dict.fromkeys(range(24), 0)

    def load_part(self) -> None:
        """An adapter of half the modules: from now on there are two module groups."""
        shapes = self.runner.shape.projections
        family = lambda number: "lora" if number % 2 else "untouched"  # noqa: E731
        self.bank.load(PART, random_adapter(shapes, family, 2, seed=4))

    def step(self, parts: list[tuple[int, int, AdapterVersion | None]]) -> StepInput:
        """Sequence, new tokens, adapter."""
        spans, segments, tokens, positions, wanted = [], [], [], [], []
        for sequence, count, who in parts:
            cached = self.cached[sequence]
            blocks = tuple(range(sequence * 16, sequence * 16 + 16))
            spans.append(SequenceSpan(sequence, cached, count, blocks))
            slot = None if who is None else self.bank.find(who)
            segments.append(Segment(count, () if slot is None else ((slot, 1.0),)))
            tokens += [(7 * sequence + 3 * (cached + i)) % 90 for i in range(count)]
            positions += range(cached, cached + count)
            wanted.append(len(tokens) - 1)
            self.cached[sequence] += count
        return StepInput(
            token_ids_T=torch.tensor(tokens),
            positions_T=torch.tensor(positions),
            spans=tuple(spans),
            plan=plan_step(segments, self.bank.resident_slots, CPU),
            logits_of_L=torch.tensor(wanted),
        )

    def forward(self, *parts: tuple[int, int, AdapterVersion | None]) -> Tensor:
        return self.runner.forward(self.step(list(parts))).clone()


pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # padding computes with whatever memory held


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> tuple[Side, Side, Again]:
    monkeypatch.setattr(building, "uses_pages", lambda _: True)
    recorder = Again()
    return Side(None), Side(recorder), recorder


STEPS: list[list[tuple[int, int, AdapterVersion | None]]] = [
    [(0, 3, FLORA), (1, 2, None), (2, 2, LORA), (3, 1, OTHER)],  # prompts: not a decode step
    [(0, 1, FLORA), (1, 1, None), (2, 1, LORA)],
    [(0, 1, FLORA), (1, 1, None), (2, 1, LORA)],
    [(3, 1, OTHER), (2, 1, LORA), (1, 1, None)],  # others, in the same shape
    [(1, 1, None)],
    [(2, 1, LORA)],
    [(0, 1, FLORA), (3, 1, OTHER), (2, 1, LORA)],
]


def test_replayed_steps_answer_as_the_runner_does(sides: tuple[Side, Side, Again]) -> None:
    plain, graphs, recorder = sides
    for parts in STEPS:
        torch.testing.assert_close(graphs.forward(*parts), plain.forward(*parts), rtol=0, atol=1e-6)
    assert recorder.replayed == len(STEPS) - 1
    assert recorder.recorded < recorder.replayed
    assert graphs.runner.graphs is not None
    assert graphs.runner.graphs.num_recorded == recorder.recorded
    swapped = [(0, 1, LORA), (3, 1, OTHER), (2, 1, FLORA)]
    right = [(0, 1, FLORA), (3, 1, OTHER), (2, 1, LORA)]
    apart = graphs.forward(*swapped) - plain.forward(*right)
    assert apart[0].abs().max() > 0.01, "an adapter that is swapped must not pass"


def test_a_bank_that_changes_under_a_graph_is_seen(sides: tuple[Side, Side, Again]) -> None:
    plain, graphs, _ = sides
    decode: list[tuple[int, int, AdapterVersion | None]] = [(0, 1, FLORA), (1, 1, LORA)]
    for side in (plain, graphs):
        side.forward(*decode)
        side.load_part()
    torch.testing.assert_close(graphs.forward(*decode), plain.forward(*decode), rtol=0, atol=1e-6)
    with_part: list[tuple[int, int, AdapterVersion | None]] = [(0, 1, PART), (1, 1, LORA)]
    got, wanted = graphs.forward(*with_part), plain.forward(*with_part)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    for side in (plain, graphs):
        side.bank.evict(PART)
        side.bank.evict(FLORA)
        side.bank.load(FLORA, random_adapter(side.runner.shape.projections, "flora", 2, seed=9))
    got, wanted = graphs.forward(*decode), plain.forward(*decode)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_base_tokens_side_by_side_and_padding_change_nothing(
    sides: tuple[Side, Side, Again],
) -> None:
    plain, graphs, recorder = sides
    many: list[tuple[int, int, AdapterVersion | None]] = [
        (number, 1, FLORA if number == 11 else None) for number in range(12)
    ]
    for _ in range(2):
        torch.testing.assert_close(graphs.forward(*many), plain.forward(*many), rtol=0, atol=1e-6)
    assert recorder.recorded == 1


def test_a_step_that_wants_other_logits_is_the_runners_own(
    sides: tuple[Side, Side, Again],
) -> None:
    _, graphs, recorder = sides
    step = graphs.step([(0, 1, None), (1, 1, None)])
    graphs.runner.forward(replace(step, logits_of_L=torch.tensor([1])))
    assert recorder.replayed == 0


def test_an_adapter_without_a_bank_is_not_answered_by_the_base(
    sides: tuple[Side, Side, Again],
) -> None:
    _, graphs, _ = sides
    step = graphs.step([(0, 1, FLORA)])
    graphs.runner._layers._bank = None
    with pytest.raises(RuntimeError, match="needs a bank"):
        graphs.runner.forward(step)


def test_batches_are_padded_by_less_than_half_and_at_most_to_sixteen_more() -> None:
    for count in range(1, 300):
        assert count <= batch_bucket(count) < min(2 * count, count + 16)
