"""Fewer places than adapters: who ends gives its place to the next, and nobody's result depends on it."""

from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny_jobs import (
    Recorder,
    adapter,
    largest_difference,
    run_of,
    sequences,
    tiny_base,
    trained,
    trainer,
)
from training.adapter_run import AdapterRun, RunStatus
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterFinished,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
)
from training.initial_rows import initial_rows, row_layouts
from training.spec import AdapterSpec
from training.trainable_rows import TrainableRows
from training.trainer import MultiAdapterTrainer
from workers.bank.bank import AdapterBank
from workers.bank.layout import ModuleLayout

MIXED = [
    adapter("flora", rank=2, rank_pattern={"q_proj": 5, "down_proj": 1}, steps=9),
    adapter("lora", family="lora", rank=4, learning_rate=5e-3, target_modules=["q_proj"], steps=5),
    adapter("paper", rank=3, offset=0, learning_rate=4e-3, steps=12, schedule="cosine"),
    adapter("rslora", family="rslora", rank=8, alpha=8, learning_rate=1e-3, steps=4),
    adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=8, batch_size=2),
    adapter("ia3", family="ia3", learning_rate=3e-2, steps=3),
    adapter("wide", rank=8, steps=6, weight_decay=0.1),
    adapter("dora-more", family="dora", rank=5, learning_rate=5e-3, steps=7, warmup_steps=3),
]


@pytest.fixture(scope="module")
def undisturbed() -> Recorder:
    return trained(*MIXED)


def assert_same(one: Recorder, other: Recorder, names: list[str]) -> None:
    for name in names:
        pairs = zip(one.losses(name), other.losses(name), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5
        assert largest_difference(one.published[name], other.published[name]) <= 1e-5


BIASED = [
    adapter("lora", family="lora", rank=4, target_modules=["q_proj"], steps=5),
    adapter("ia3", family="ia3", learning_rate=3e-2, steps=4),
    adapter("ia3-more", family="ia3", learning_rate=1e-2, steps=3, target_modules=["v_proj"]),
]
"""Of a model with biases, where LoRA on k_proj would have gradients that are nothing but rounding."""


@pytest.mark.parametrize(
    ("specs", "has_biases", "places"), [(MIXED, False, 1), (MIXED, False, 3), (BIASED, True, 1)]
)
def test_what_an_adapter_becomes_does_not_depend_on_the_number_of_places(
    specs: list[AdapterSpec], has_biases: bool, places: int
) -> None:
    expected = trained(*specs, has_biases=has_biases)
    recorder = Recorder()
    job = trainer(*specs, recorder=recorder, has_biases=has_biases, max_resident=places)
    while not job.is_done:
        job.step()
        assert job.rows.check_integrity()
        assert len(job.rows.residents) <= places
    assert_same(recorder, expected, [spec.name for spec in specs])


def test_places_go_to_the_longest_first_and_at_once() -> None:
    done = trained(*MIXED, max_resident=2)
    started = [event.adapter for event in done.of(AdapterStarted)]
    by_length = sorted(MIXED, key=lambda spec: -spec.num_steps(0))
    assert started == [spec.name for spec in by_length]
    at = {(type(event), getattr(event, "adapter", "")): n for n, event in enumerate(done.events)}
    for ended, begun in (("flora", "dora"), ("paper", "dora-more")):
        between = done.events[at[AdapterPublished, ended] : at[AdapterStarted, begun]]
        assert not any(isinstance(event, AdapterStep) for event in between)


def test_who_waits_has_no_rows() -> None:
    few, many = (
        trainer(*[adapter(f"a{n}", rank=8, steps=3) for n in range(10)], recorder=Recorder(), **how)
        for how in ({"max_resident": 2}, {})
    )
    for job in (few, many):
        job.start()
    numbers = [
        sum(block.weight_KW.numel() for block in job.rows.blocks.values()) for job in (few, many)
    ]
    assert numbers[0] < 0.25 * numbers[1]
    assert [run.status for run in few.runs].count(RunStatus.WAITING) == 8
    assert few.state_of(9)["rows"] is None


@pytest.mark.parametrize("places", [1, 4])
def test_a_checkpoint_with_waiting_adapters_goes_on_with_any_number_of_places(
    places: int, undisturbed: Recorder
) -> None:
    """Also with fewer than were training when it was taken, whose rows then wait in it."""
    first, second = Recorder(), Recorder()
    cut_off = trainer(*MIXED, recorder=first, max_resident=3)
    for _ in range(10):
        cut_off.step()
    resumed = trainer(*MIXED, recorder=second, max_resident=places)
    for number in range(len(MIXED)):
        resumed.restore(number, saved(cut_off.state_of(number)))
    resumed.start()
    # Once more, while some wait with the rows they had.
    again = trainer(*MIXED, recorder=second, max_resident=places)
    for number in range(len(MIXED)):
        again.restore(number, saved(resumed.state_of(number)))
    again.run()
    published = first.published.keys() & second.published.keys()
    assert first.published and not published
    for name in (spec.name for spec in MIXED):
        losses = first.losses(name) + second.losses(name)
        pairs = zip(losses, undisturbed.losses(name), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5
        rows = {**first.published, **second.published}[name]
        assert largest_difference(rows, undisturbed.published[name]) <= 1e-5


def saved(state: object) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


def test_early_stops_and_evaluations_are_the_same_among_those_who_come_and_go() -> None:
    watched = [
        adapter(
            name,
            rank=rank,
            evaluation={"fraction": 0.2, "every_steps": 2},
            early_stop={"patience": 1},
            learning_rate=5e-2,
            steps=20,
        )
        for name, rank in (("one", 1), ("two", 4))
    ]

    def run(spec: AdapterSpec) -> AdapterRun:
        # More than a step may hold: evaluated in parts.
        return run_of(spec, held_out=sequences("other", 6))

    wide = torch.float64  # at this rate, a rounding of float32 grows
    expected = trained(*watched, run=run, dtype=wide)
    found = trained(*watched, run=run, dtype=wide, max_resident=1, max_step_tokens=32)
    for kind in (AdapterEvaluated, AdapterFinished):
        for spec in watched:
            ours, theirs = (
                [event for event in recorder.of(kind) if event.adapter == spec.name]
                for recorder in (found, expected)
            )
            assert [event.step for event in ours] == [event.step for event in theirs]
            losses = zip(ours, theirs, strict=True)
            assert max(abs(a.loss - b.loss) for a, b in losses) <= 1e-5
    assert all("its best" in event.reason for event in found.of(AdapterFinished))
    assert_same(found, expected, [spec.name for spec in watched])


def test_the_place_of_one_that_failed_is_taken_and_its_numbers_are_not() -> None:
    """The next one gets the pages in which infinities were, and becomes what it would alone."""
    broken = adapter("broken", rank=8, steps=30, learning_rate=1.0, clip_norm=None)
    others = [adapter("flora", rank=8, steps=6), adapter("dora", family="dora", rank=7, steps=6)]
    recorder = Recorder()
    job = trainer(broken, *others, recorder=recorder, max_resident=1)
    job.start()
    for block in job.rows.blocks.values():
        block.weight_KW[block.owner_K == 0] = torch.inf
    job.run()
    assert [event.adapter for event in recorder.of(AdapterFailed)] == ["broken"]
    for spec in others:
        assert_same(recorder, trained(spec), [spec.name])


@pytest.mark.parametrize("spec", MIXED, ids=[spec.name for spec in MIXED])
def test_the_shape_of_rows_is_known_before_there_are_any(spec: AdapterSpec) -> None:
    shapes = {
        "layers.0.q_proj": (16, 24),
        "layers.1.down_proj": (8, 16),
        "layers.1.up_proj": (16, 8),
    }
    targets = spec.model_copy(update={"target_modules": "all-linear", "rank_pattern": {}})
    rows = initial_rows(targets, shapes, torch.float32)
    expected = {path: ModuleLayout.of(one) for path, one in rows.modules.items()}
    assert row_layouts(targets, shapes, biased=shapes.keys()) == expected


def test_the_rows_of_a_trainer_that_is_gone_are_free_before_the_next_one_takes_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = trainer(*MIXED, recorder=Recorder())
    job.step()
    base, specs = job._base, [run.spec for run in job.runs]
    held: list[object] = [job.rows.bank, *(b.weight_KW for b in job.rows.blocks.values())]
    rows = [weakref.ref(one) for one in held]
    alive: list[int] = []

    def next_bank(*args: Any, **options: Any) -> AdapterBank:
        alive.append(sum(one() is not None for one in rows))
        return AdapterBank(*args, **options)

    monkeypatch.setattr("training.trainable_rows.AdapterBank", next_bank)
    del job, held
    recorder = Recorder()
    MultiAdapterTrainer(
        base,
        [run_of(spec) for spec in specs],
        publish=recorder.publish,
        on_event=recorder.events.append,
    ).step()
    assert alive == [0]
    assert len(recorder.of(AdapterStep)) == len(specs)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, len(MIXED) - 1), max_size=30))
def test_any_coming_and_going_keeps_every_row_to_one_owner(moves: list[int]) -> None:
    base = tiny_base(has_biases=True)
    projections = base.layers.projections
    layouts = [row_layouts(spec, projections, base.layers.biases) for spec in MIXED]
    rows = TrainableRows(base.layers, layouts, 3, torch.float32, base.device)
    for number in moves:
        if number in rows.residents:
            rows.release(number)
        elif rows.has_room:
            rows.admit(number, initial_rows(MIXED[number], projections, torch.float32))
        else:
            with pytest.raises(ValueError, match="no place"):
                rows.admit(number, initial_rows(MIXED[number], projections, torch.float32))
        assert rows.check_integrity()
