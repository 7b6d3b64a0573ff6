"""The bar: adapters trained together end as each would alone. What one does never reaches another."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.tiny_jobs import (
    ANY_OTHER,
    NOT_A_NUMBER,
    Recorder,
    adapter,
    largest_difference,
    trained,
    trained_with_token,
    trainer,
)
from training.events import AdapterFailed, AdapterPublished, AdapterStarted
from training.spec import AdapterSpec

EIGHT = [
    adapter("one", rank=1, batch_size=2, weight_decay=0.05),
    adapter(
        "two",
        rank=2,
        rank_pattern={"q_proj": 5, "down_proj": 1},
        seed=4,
        schedule="cosine",
        warmup_steps=5,
        learning_rate=1.2e-2,
        steps=70,
    ),
    adapter("paper", rank=3, offset=0, seed=5, learning_rate=4e-3),
    adapter("lora", family="lora", rank=4, learning_rate=5e-3, target_modules=["q_proj", "v_proj"]),
    adapter("dora", family="dora", rank=6, learning_rate=5e-3, rank_pattern={"up_proj": 4}),
    adapter(
        "rslora",
        family="rslora",
        rank=7,
        alpha=8,
        batch_size=3,
        learning_rate=1e-3,
        steps=60,
        schedule="linear",
    ),
    adapter("ia3", family="ia3", learning_rate=3e-2, target_modules=["k_proj", "down_proj"]),
    adapter("eight", rank=8, seed=6, schedule="linear", clip_norm=0.1, steps=55),
]
"""Every family, ranks 1 to 8, each with data of its own."""


@pytest.fixture(scope="module", params=[8, 3], ids=["all at once", "three places"])
def together(request: pytest.FixtureRequest) -> Recorder:
    return trained(*EIGHT, max_resident=request.param)


@pytest.fixture(scope="module")
def alone() -> dict[str, Recorder]:
    return {spec.name: trained(spec) for spec in EIGHT}


@pytest.mark.parametrize("spec", EIGHT, ids=[spec.name for spec in EIGHT])
def test_adapters_trained_together_equal_each_trained_alone(
    spec: AdapterSpec, together: Recorder, alone: dict[str, Recorder]
) -> None:
    losses, expected = together.losses(spec.name), alone[spec.name].losses(spec.name)
    assert len(losses) == spec.steps >= 50
    assert expected[-1] <= 0.8 * expected[0], "it must have learnt something to be compared"
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-5
    rows, alone_rows = together.published[spec.name], alone[spec.name].published[spec.name]
    assert largest_difference(rows, alone_rows) <= 1e-5


def test_another_seed_is_another_adapter() -> None:
    """The twin of the test above: it can tell two adapters apart."""
    one, other = trained(adapter("one", seed=1)), trained(adapter("one", seed=2))
    assert largest_difference(one.published["one"], other.published["one"]) > 1e-2


@pytest.mark.parametrize("value", [math.nan, 3e38])
@pytest.mark.parametrize("family", ["flora", "lora", "dora", "ia3"])
def test_a_broken_adapter_leaves_the_healthy_ones_bits_alone(family: str, value: float) -> None:
    """Compared with the same job in which the neighbour is well and ends after the step that breaks it here."""
    healthy = [
        adapter("flora", rank=4, steps=12),
        adapter("lora", family="lora", rank=2, learning_rate=5e-3, steps=12),
        adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=12),
    ]
    rank = 1 if family == "ia3" else 3
    neighbour = adapter("neighbour", family=family, rank=rank, steps=1, batch_size=3)
    expected = trained(healthy[0], neighbour, *healthy[1:])

    recorder = Recorder()
    broken = trainer(
        healthy[0], neighbour.model_copy(update={"steps": 12}), *healthy[1:], recorder=recorder
    )
    broken.start()
    for block in broken.rows.blocks.values():
        block.weight_KW[block.owner_K == 1] = value
    broken.rows.refresh()
    broken.run()

    (failure,) = recorder.of(AdapterFailed)
    assert failure.adapter == "neighbour"
    assert "step 1 is not finite" in failure.reason
    assert [event.adapter for event in recorder.of(AdapterPublished)] == [
        spec.name for spec in healthy
    ]
    for spec in healthy:
        assert recorder.losses(spec.name) == expected.losses(spec.name)
        rows, others = recorder.published[spec.name], expected.published[spec.name]
        for path, module in rows.modules.items():
            for name, tensor in module.tensors().items():
                assert torch.equal(tensor, others.modules[path].tensors()[name]), (path, name)


@pytest.mark.parametrize("family", ["flora", "lora", "rslora", "dora", "ia3"])
def test_one_that_breaks_while_it_learns_leaves_the_others_bits_and_its_place(family: str) -> None:
    """Its first update is far too large, so its second loss is not a number; who waits takes the place then.

    Compared with the same job in which it learns as it should, and ends after that step.
    """
    others = [
        adapter("flora", rank=4, steps=8),
        adapter("lora", family="lora", rank=2, learning_rate=5e-3, steps=7),
        adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=7),
        adapter("ia3", family="ia3", learning_rate=3e-2, steps=6),
        adapter("next", rank=6, steps=2),
    ]
    learner = adapter("learner", family=family, rank=1 if family == "ia3" else 3, steps=2)
    expected = trained(learner, *others, max_resident=5)
    breaks = learner.model_copy(update={"learning_rate": 1e38, "clip_norm": None, "steps": 8})
    found = trained(breaks, *others, max_resident=5)

    (failure,) = found.of(AdapterFailed)
    assert (failure.adapter, failure.step) == ("learner", 1)
    assert "the loss of step 2 is not finite" in failure.reason
    assert [event.adapter for event in found.of(AdapterStarted)][-1] == "next"
    started = found.events.index(found.of(AdapterStarted)[-1])
    assert started > found.events.index(failure)
    for spec in others:
        assert found.losses(spec.name) == expected.losses(spec.name)
        assert largest_difference(found.published[spec.name], expected.published[spec.name]) == 0.0


@pytest.mark.parametrize("family", ["flora", "lora", "dora", "ia3"])
def test_data_that_makes_one_not_a_number_stops_it_there_and_leaves_the_others_bits(
    family: str,
) -> None:
    """Compared with the same job on data without that token, in which it ends after that step."""
    healthy = [
        adapter("flora", rank=4, steps=9),
        adapter("lora", family="lora", rank=2, learning_rate=5e-3, steps=9),
        adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=9),
    ]
    fed = adapter("fed", family=family, rank=1 if family == "ia3" else 3, steps=9, batch_size=2)
    found = trained_with_token([healthy[0], fed, *healthy[1:]], "fed", NOT_A_NUMBER)

    (failure,) = found.of(AdapterFailed)
    assert failure.adapter == "fed" and failure.step > 0, "it learnt before"
    assert f"the loss of step {failure.step + 1} is not finite" in failure.reason
    assert all(math.isfinite(loss) for loss in found.losses("fed"))
    ends_there = fed.model_copy(update={"steps": failure.step + 1})
    expected = trained_with_token([healthy[0], ends_there, *healthy[1:]], "fed", ANY_OTHER)
    assert set(found.published) == {spec.name for spec in healthy}
    assert set(expected.published) == {"fed", *found.published}
    for spec in healthy:
        assert found.losses(spec.name) == expected.losses(spec.name)
        assert largest_difference(found.published[spec.name], expected.published[spec.name]) == 0.0


def test_a_finished_adapter_is_published_at_once() -> None:
    recorder = Recorder()
    job = trainer(adapter("short", steps=3), adapter("long", steps=9), recorder=recorder)
    for _ in range(3):
        job.step()
    assert set(recorder.published) == {"short"}
    while not job.is_done:
        job.step()
    assert set(recorder.published) == {"short", "long"}


def test_a_step_split_over_several_forwards_has_the_same_gradient() -> None:
    specs = [adapter("one", rank=2, steps=8), adapter("two", rank=4, steps=8)]
    whole, parts = trained(*specs), trained(*specs, max_step_tokens=16)
    for spec in specs:
        assert largest_difference(whole.published[spec.name], parts.published[spec.name]) < 1e-5
