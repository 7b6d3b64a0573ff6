"""One adapter's life: how it begins, is evaluated, stops, is refused, is saved and goes on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from storage.adapter_rows import AdapterRows
from storage.errors import AdapterRefusedError, InvalidRequestError, SpecificationError
from storage.identity import AdapterVersion
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
from training.adapter_run import AdapterRun
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterFinished,
    AdapterPublished,
    AdapterStarted,
)
from training.frozen_base import FrozenBase
from training.initial_rows import initial_rows
from training.spec import AdapterSpec
from training.trainer import MultiAdapterTrainer
from workers.models.loading import LoadedBase

SHAPES = {"layers.0.q_proj": (16, 24), "layers.1.q_proj": (16, 24), "layers.1.up_proj": (16, 8)}


@pytest.mark.parametrize("offset", [0, 1])
def test_no_two_rows_of_a_module_begin_alike(offset: int) -> None:
    rows = initial_rows(adapter("a", rank=5, offset=offset), SHAPES, torch.float32)
    for module in rows.modules.values():
        assert module.mul_b_RI is not None and module.mul_a_RO is not None
        assert module.offset == offset
        assert len({tuple(row.tolist()) for row in module.mul_b_RI}) == 5
        effect = module.offset + module.mul_a_RO.T @ module.mul_b_RI
        assert torch.equal(effect, torch.ones_like(effect))


def test_rows_begin_the_same_whatever_else_the_adapter_targets() -> None:
    everything = initial_rows(adapter("a", rank=2), SHAPES, torch.float32)
    some = initial_rows(adapter("b", rank=2, target_modules=["up_proj"]), SHAPES, torch.float32)
    assert some.modules.keys() == {"layers.1.up_proj"}
    same = AdapterRows({path: everything.modules[path] for path in some.modules})
    assert largest_difference(some, same) == 0.0


def test_a_target_the_model_does_not_have_is_named() -> None:
    with pytest.raises(SpecificationError, match=r"no linear layer 'k_proj'; it has q_proj, up_pr"):
        initial_rows(adapter("a", target_modules=["k_proj"]), SHAPES, torch.float32)


def test_held_out_loss_is_measured_and_ends_what_no_longer_improves() -> None:
    early = adapter(
        "early",
        evaluation={"fraction": 0.2, "every_steps": 2},
        early_stop={"patience": 2, "min_improvement": 100.0},
        steps=40,
    )
    steady = adapter("steady", evaluation={"fraction": 0.2, "every_steps": 5}, steps=10)
    held_out = sequences("early", 5)
    done = trained(early, steady, run=lambda spec: run_of(spec, held_out=held_out))
    assert [(e.adapter, e.step) for e in done.of(AdapterEvaluated)] == [
        ("early", 2),
        ("early", 4),
        ("steady", 5),
        ("early", 6),
        ("steady", 10),
    ]
    assert [(e.adapter, e.step) for e in done.of(AdapterFinished)] == [("early", 6), ("steady", 10)]
    assert "early stop" in done.of(AdapterFinished)[0].reason
    assert set(done.published) == {"early", "steady"}


@pytest.mark.parametrize("restarts", [False, True], ids=["undisturbed", "restored"])
def test_who_stops_early_publishes_its_best_step(restarts: bool) -> None:
    """The held-out examples are other ones, so that learning the training examples soon makes them worse."""
    spec = adapter(
        "early",
        evaluation={"fraction": 0.2, "every_steps": 1},
        early_stop={"patience": 3},
        learning_rate=5e-2,
        steps=40,
    )

    def run(spec: AdapterSpec) -> AdapterRun:
        return run_of(spec, held_out=sequences("other", 5))

    if restarts:
        recorder = Recorder()
        cut_off = trainer(spec, recorder=recorder, run=run)
        cut_off.start()
        while cut_off.runs[0].evaluations_without_improvement < 2:
            cut_off.step()
        resumed = trainer(spec, recorder=recorder, run=run)
        resumed.restore(0, cut_off.state_of(0))
        resumed.run()
    else:
        recorder = trained(spec, run=run)
    evaluated = {event.step: event.loss for event in recorder.of(AdapterEvaluated)}
    (finished,) = recorder.of(AdapterFinished)
    best = min(evaluated, key=evaluated.__getitem__)
    assert best == finished.step - 3
    assert f"of step {best}, its best" in finished.reason
    as_long_as_the_best = trained(spec.model_copy(update={"steps": best}), run=run)
    difference = largest_difference(
        recorder.published["early"], as_long_as_the_best.published["early"]
    )
    assert difference == 0.0


def test_evaluation_changes_nothing_but_the_events() -> None:
    spec = adapter("a", steps=6)
    watched = spec.model_copy(
        update={
            "evaluation": adapter("x", evaluation={"fraction": 0.5, "every_steps": 1}).evaluation
        }
    )
    plain = trained(spec)
    seen = trained(watched, run=lambda spec: run_of(spec, held_out=sequences("other", 7)))
    assert len(seen.of(AdapterEvaluated)) == 6
    assert largest_difference(plain.published["a"], seen.published["a"]) == 0.0


def test_an_adapter_refused_at_publish_fails_alone() -> None:
    class Refusing(Recorder):
        def publish(self, spec: AdapterSpec, rows: AdapterRows) -> AdapterVersion:
            if spec.name == "bad":
                raise AdapterRefusedError("a weight is larger than 10,000")
            return super().publish(spec, rows)

    recorder = Refusing()
    job = trainer(adapter("bad", steps=2), adapter("good", steps=4), recorder=recorder)
    job.run()
    (failure,) = recorder.of(AdapterFailed)
    assert (failure.adapter, failure.reason) == (
        "bad",
        "it was refused: a weight is larger than 10,000",
    )
    assert [event.adapter for event in recorder.of(AdapterPublished)] == ["good"]


SPECS = [
    adapter("one", rank=2, steps=12, schedule="cosine", warmup_steps=3),
    adapter("two", family="lora", rank=3, steps=9, learning_rate=5e-3),
    adapter("done", rank=1, steps=3),
    adapter("magnitude", family="dora", rank=2, steps=9, learning_rate=5e-3),
    adapter("scale", family="ia3", steps=9, learning_rate=3e-2),
]


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (4, 1, 3, 0)], ids=["same neighbours", "other neighbours"]
)
def test_stopped_and_restored_equals_undisturbed(order: tuple[int, ...]) -> None:
    """From saved bytes, in a new trainer, also among other neighbours than before."""
    undisturbed = trained(*SPECS)
    first = Recorder()
    cut_off = trainer(*SPECS, recorder=first)
    cut_off.start()
    for _ in range(5):
        cut_off.step()
    saved = []
    for number in range(len(SPECS)):
        file = io.BytesIO()
        torch.save(cut_off.state_of(number), file)
        saved.append(file.getvalue())

    second = Recorder()
    resumed = trainer(*[SPECS[index] for index in order], recorder=second)
    for number, index in enumerate(order):
        resumed.restore(number, torch.load(io.BytesIO(saved[index]), weights_only=True))
    resumed.run()

    assert {(e.adapter, e.step) for e in second.of(AdapterStarted)} == {
        (SPECS[index].name, 5) for index in order if SPECS[index].name != "done"
    }
    assert "done" not in second.published, "it was published before"
    for name in ("one", "two", "magnitude", "scale"):
        expected = undisturbed.losses(name)
        pairs = zip(first.losses(name) + second.losses(name), expected, strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-6
        assert largest_difference(second.published[name], undisturbed.published[name]) <= 1e-6


def test_bfloat16_bases_train_float32_rows() -> None:
    done = trained(adapter("a", rank=4, learning_rate=8e-3), dtype=torch.bfloat16)
    losses = done.losses("a")
    assert losses[-1] < 0.8 * losses[0]
    rows = next(iter(done.published["a"].modules.values()))
    assert rows.mul_a_RO is not None and rows.mul_a_RO.dtype == torch.float32


def test_a_model_that_scales_its_logits_is_refused_by_name() -> None:
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.0625,
        eos_token_id=2,
    )
    model = CohereForCausalLM(config).eval()
    with pytest.raises(InvalidRequestError, match="CohereForCausalLM changes its logits"):
        FrozenBase.adopt(LoadedBase(model, "0" * 64, Path("nowhere")), max_tokens=64)


def test_steps_come_from_epochs_and_the_size_of_the_data() -> None:
    spec = adapter("a", steps=None, epochs=2.5, batch_size=4)
    assert spec.num_steps(10) == 7
    base = tiny_base()
    recorder = Recorder()
    job = MultiAdapterTrainer(
        base, [run_of(spec)], publish=recorder.publish, on_event=recorder.events.append
    )
    job.run()
    assert len(recorder.losses("a")) == 8  # 2.5 × 12 examples in fours


def test_a_stopped_adapter_ends_unpublished_and_the_others_do_not_notice() -> None:
    specs = [adapter(name, steps=6) for name in ("one", "two", "three")]
    alone = trained(specs[0], specs[2])
    recorder = Recorder()
    many = trainer(*specs, recorder=recorder, max_resident=2)
    many.step()
    many.stop("two", "it was cancelled")
    many.stop("nobody", "it was cancelled")
    many.run()
    (failed,) = recorder.of(AdapterFailed)
    assert (failed.adapter, failed.step, failed.reason) == ("two", 1, "it was cancelled")
    assert set(recorder.published) == {"one", "three"}
    assert recorder.losses("one") == pytest.approx(alone.losses("one"), abs=1e-5)

    waits = Recorder()
    few = trainer(*specs, recorder=waits, max_resident=1)
    few.stop("three", "it was cancelled")  # which has no rows yet
    few.run()
    assert set(waits.published) == {"one", "two"}
