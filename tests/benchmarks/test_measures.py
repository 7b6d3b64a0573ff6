"""Every benchmark runs in small on a tiny model, and refuses a comparison of things that are not the same.

No figure is judged here: what is checked is that the right things were measured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import adapters_scale, engine, training, training_modes, unpatched
from benchmarks.own_engine import Answered, OwnEngine
from benchmarks.population import Population, publish_all
from benchmarks.results_file import Side, VoidRunError
from benchmarks.timed_training import TimedTrainer
from benchmarks.vllm_process import VllmProcess
from benchmarks.workload import Batch, Zipf
from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import read_base_facts
from storage.identity import AdapterVersion
from training.frozen_base import FrozenBase
from workers.config import EngineSettings
from workers.models.loading import load_base
from workers.row_form.adapted_linear import AdaptedLinear
from workers.row_form.joint_linear import JointLinear

TINY = EngineSettings(dtype="float32", device="cpu", max_step_tokens=64)
SMALL = Batch(requests=4, prompt_tokens=6, answer_tokens=5, vocabulary=200)


def tiny_engine(directory: Path, runner: str = "auto") -> OwnEngine:
    settings = TINY.model_copy(update={"base": str(directory), "runner": runner})
    return OwnEngine.with_adapters(settings, {})


def test_the_engine_is_measured_on_every_side_of_the_table(tiny_llama_dir: Path) -> None:
    measured = engine.measure(tiny_llama_dir, 2, batch=SMALL, num_adapters=2, settings=TINY)
    rows = {row.name: row for row in measured.rows}
    for side, (_, _, bar) in engine.ADAPTED.items():
        assert rows[f"{side} / our own base"].bar == bar
        assert len(rows[f"{side} / our own base"].rounds) == 2
    assert rows["base, tokens per second"].value > 0
    assert len(rows["base, cores used"].rounds) == 2
    assert [side.name for side in measured.sides] == ["our engine"]


def test_answers_from_the_base_model_are_not_counted_as_an_adapters() -> None:
    base = [Answered(1.0, ((1, 2), (3, 4)))]
    other = [Answered(1.0, ((5, 2), (6, 4)))]
    results = dict.fromkeys(engine.ADAPTED, other)
    engine._check_adapters_are_used({engine.BASE: base, **results})
    with pytest.raises(VoidRunError, match="answers as the base"):
        engine._check_adapters_are_used({engine.BASE: base, **results, engine.LORA: base})


def test_a_peer_with_other_adapters_than_ours_makes_the_run_void() -> None:
    base = [Answered(1.0, ((1,), (2,)))]
    ours = [Answered(1.0, ((3,), (4,)))]
    sides = {engine.BASE: base, f"vLLM, {engine.BASE}": base, **dict.fromkeys(engine.ADAPTED, ours)}
    engine._check_adapters_are_used({**sides, f"vLLM, {engine.LORA}": ours})
    with pytest.raises(VoidRunError, match="vLLM's LoRA"):
        engine._check_adapters_are_used({**sides, f"vLLM, {engine.LORA}": base})


def test_a_peer_that_cannot_bind_its_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="intel-openmp"):
        VllmProcess(
            tmp_path / "bin" / "python", tmp_path, {}, Side("vLLM", 1, (0,)), tmp_path / "log"
        )


def test_a_batch_is_answered_whole_whatever_the_concurrency(tiny_llama_dir: Path) -> None:
    side = tiny_engine(tiny_llama_dir)
    try:
        together = side.run(SMALL.prompts(0), [None] * 4, 5)
        in_turn = side.run(SMALL.prompts(0), [None] * 4, 5, concurrency=1)
    finally:
        side.close()
    assert [len(answer) for answer in together.answers] == [5] * 4
    assert in_turn.answers == together.answers
    assert together.tokens_per_s == 20 / together.seconds


def test_an_unknown_adapter_ends_a_measurement(tiny_llama_dir: Path) -> None:
    side = tiny_engine(tiny_llama_dir)
    try:
        with pytest.raises(Exception, match="no adapter"):
            side.run(SMALL.prompts(0)[:1], [AdapterVersion("f" * 64)], 2)
    finally:
        side.close()


@pytest.mark.parametrize("runner", ["hf", "native"])
def test_unpatching_leaves_no_adapted_layer_in_use_and_the_same_answers(
    tiny_llama_dir: Path, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = tiny_engine(tiny_llama_dir, runner)
    try:
        before = side.run(SMALL.prompts(0), [None] * 4, 5)
        assert unpatched.unpatch(side.engine) == len(
            read_base_facts(tiny_llama_dir, "").projections
        )
        monkeypatch.delattr(AdaptedLinear, "forward")
        monkeypatch.delattr(JointLinear, "__call__")
        assert side.run(SMALL.prompts(0), [None] * 4, 5).answers == before.answers
    finally:
        side.close()


def test_enabled_adapters_are_compared_with_unpatched_layers(tiny_llama_dir: Path) -> None:
    [row] = unpatched.measure(tiny_llama_dir, 6, batch=SMALL, num_adapters=2, settings=TINY)
    assert row.bar == 0.98
    assert len(row.rounds) == 6
    assert row.interval_95 is not None


def test_registered_adapters_really_come_from_the_registry(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    people = Population(Zipf(12), resident=4, highest_rank=3, bank_rows=12, bank_slots=6)
    batch = Batch(requests=10, prompt_tokens=6, answer_tokens=3, vocabulary=200)
    rows = adapters_scale.measure(
        tiny_llama_dir, tmp_path, 2, batch=batch, concurrency=3, people=people, settings=TINY
    )
    of_name = {row.name: row for row in rows}
    assert of_name["12 registered FLoRA adapters / 4 resident"].bar == 0.90
    assert of_name["12 registered LoRA adapters / 4 resident"].bar == 0.90
    assert of_name["LoRA: ms that the step thread waits for loads in a round"].bar == 0.5
    assert sum(of_name["FLoRA: adapters loaded in a round"].rounds) > 0
    assert of_name["LoRA: requests whose adapter was on the device"].value < 1


def test_both_sides_of_a_round_get_the_same_ranks() -> None:
    resident = [AdapterVersion(f"{index:064x}") for index in range(4)]
    chosen = adapters_scale._of_ranks([2, 1, 2, 2], [1, 2, 2, 1], resident)
    assert chosen == [resident[1], resident[0], resident[2], resident[1]]


def test_prepared_adapters_are_published_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    people = Population(Zipf(3), highest_rank=2)
    base = read_base_facts(tiny_llama_dir, "tiny")
    first = publish_all(base, tmp_path, "flora", people, seed=0)
    assert len(set(first.versions)) == 3
    blobs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert publish_all(base, tmp_path, "flora", people, seed=0) == first
    assert blobs == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }


def test_the_memory_of_a_side_of_training_is_that_of_a_process_of_its_own(
    tiny_llama_dir: Path,
) -> None:
    held = torch.ones(1 << 28)  # a gibibyte here is none there
    peak = training._peak_in_a_process(tiny_llama_dir, "float32", 2, 8, 200)
    assert held.nbytes == 1 << 30
    assert peak is None or 50 < peak < 1000


def test_training_is_measured_together_and_apart(tiny_llama_dir: Path) -> None:
    sizes = training.Sizes(
        adapters=(1, 2),
        tokens=(6,),
        bars={(2, 6): 2.0},
        ranks=(1, 3),
        rank_tokens=8,
        vocabulary=200,
    )
    rows = {row.name: row for row in training.measure(tiny_llama_dir, 2, sizes=sizes)}
    title = "bfloat16, 2 FLoRA r1, 6 tokens each"
    together = rows[f"{title}: together / one after another"]
    assert (together.bar, together.better, len(together.rounds)) == (2.0, "higher", 2)
    assert rows[f"{title}: PEFT's loop, tokens/s"].value > 0
    assert rows["bfloat16, 1 FLoRA r1, 6 tokens each: together / one after another"].bar is None
    ranks = rows["bfloat16, training step, FLoRA r3 / r1, 8 tokens"]
    assert (ranks.bar, ranks.better) == (1.8, "lower")


@pytest.mark.parametrize(("faded", "is_measured"), [(0.0, True), (float("inf"), False)])
def test_longer_batches_are_measured_only_while_together_gains(
    faded: float, is_measured: bool, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "FADED", faded)
    sizes = training.Sizes(
        adapters=(2,), tokens=(4,), farther={2: (6,)}, rank_tokens=4, vocabulary=200, peft=False
    )
    rows = {row.name for row in training.measure(tiny_llama_dir, 1, sizes=sizes)}
    assert ("bfloat16, 2 FLoRA r1, 6 tokens each: together, tokens/s" in rows) is is_measured


def test_the_place_where_a_gain_fades_lies_between_the_sizes_around_it() -> None:
    assert training.fades_at({32: 2.0, 128: 1.5, 512: 1.2}) is None
    found = training.fades_at({32: 2.0, 128: 1.3, 512: 0.9})
    assert found == pytest.approx(256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_size_is_trained_in_both_modes_and_judged_by_the_chosen_one(
    dtype: torch.dtype, tiny_llama_dir: Path
) -> None:
    sizes = training_modes.Sizes(
        ranks=(1, 8), tokens=(6, 100), mixed_ranks=(1, 2), mixed_tokens=9, vocabulary=200
    )
    rows = training_modes.measure(tiny_llama_dir, 2, dtype, sizes)
    kind = str(dtype).removeprefix("torch.")
    long_by = "weights" if dtype == torch.float32 else "rows"
    names = [row.name for row in rows]
    assert f"{kind}, FLoRA r1, 6 tokens each: by rows / the faster mode" in names
    assert f"{kind}, FLoRA r8, 100 tokens each: by {long_by} / the faster mode" in names
    judged = [row for row in rows if row.bar is not None]
    assert len(judged) == 4 and all(len(row.rounds) == 2 for row in judged)
    assert len(rows) == (5 if dtype == torch.bfloat16 else 4)


def test_trainers_that_share_a_base_train_their_own_rows(tiny_llama_dir: Path) -> None:
    loaded = load_base(str(tiny_llama_dir), torch.float32, torch.device("cpu"))
    base = FrozenBase.adopt(loaded, max_tokens=9)
    one, other = (TimedTrainer(base, {name: 1}, 8, 200) for name in range(2))
    before = other._trainer.rows.rows_of(0)
    one.seconds(2)
    assert is_same(other._trainer.rows.rows_of(0), before)
    other.seconds(2)
    assert not is_same(other._trainer.rows.rows_of(0), before)


def is_same(one: AdapterRows, other: AdapterRows) -> bool:
    return all(
        torch.equal(tensor, other.modules[path].tensors()[name])
        for path, rows in one.modules.items()
        for name, tensor in rows.tensors().items()
    )
