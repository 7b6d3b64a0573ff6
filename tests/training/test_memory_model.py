"""What fits in memory is known before anything runs: who trains at once, how long a forward is, and who is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from storage.errors import SpecificationError
from tests.training.tiny_jobs import adapter, run_of, sequences, tiny_base, tiny_model
from training.activation_bytes import RunBytes
from training.activation_memory import measure_run
from training.adapter_run import AdapterData
from training.batches import OwnedSequence, pack
from training.config import TrainingSettings
from training.frozen_base import FrozenBase
from training.initial_rows import initial_rows, row_layouts
from training.job_memory import (
    FittedBase,
    adapter_needs,
    base_shape,
    memory_budget,
    trainer_limits,
)
from training.kept_bytes import estimated_run
from training.memory_model import (
    BACKWARD,
    SLACK,
    AdapterNeeds,
    StepBytes,
    StepLimits,
    activation_bytes,
    estimated_runs,
    plan_steps,
    step_bytes,
)
from training.row_room import RowRoom
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainable_rows import TrainableRows
from workers.machine_memory import usable_memory
from workers.models.loading import LoadedBase

LARGE = base_shape(
    LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    torch.float32,
)
GIBIBYTE = 1 << 30


def planned(adapters: list[AdapterNeeds], **how: Any) -> StepLimits:
    kept = activation_bytes(LARGE, adapters, estimated_runs(LARGE, adapters))
    return plan_steps(LARGE, adapters, kept, **{"max_step_tokens": 8192, "checkpoint": None, **how})


def taken(adapters: list[AdapterNeeds], **how: Any) -> StepBytes:
    kept = activation_bytes(LARGE, adapters, estimated_runs(LARGE, adapters))
    return step_bytes(LARGE, adapters, kept, **how)


def needs(name: str, rank: int = 8, tokens: int = 512, longest: int = 256) -> AdapterNeeds:
    layouts = row_layouts(adapter(name, rank=rank), LARGE.projections, LARGE.biased)
    return AdapterNeeds(name, layouts, longest, min(tokens, longest), tokens, 2 * tokens)


def test_a_base_is_known_from_its_configuration_alone() -> None:
    model = tiny_model(has_biases=True)
    shape = base_shape(model.config, torch.float32)
    assert shape.parameters == sum(one.numel() for one in model.parameters())
    layers = tiny_base(has_biases=True).layers
    assert shape.projections == layers.projections
    assert shape.biased == layers.biases.keys()
    turned = base_shape(GPT2Config(n_layer=1, n_embd=12, n_head=2), torch.float32)
    assert turned.projections["transformer.h.0.mlp.c_fc"] == (12, 48)
    assert 1.0e9 < LARGE.parameters < 1.2e9


def test_rows_take_what_the_bank_and_the_optimizer_hold() -> None:
    base = tiny_base()
    specs = [adapter("a", rank=3), adapter("b", family="dora", rank=2), adapter("c", family="ia3")]
    layouts = [row_layouts(spec, base.layers.projections, ()) for spec in specs]
    for residents in (1, 2, 3):
        rows = TrainableRows(base.layers, layouts, residents, torch.float32, base.device)
        held = {width: block.weight_KW.numel() for width, block in rows.blocks.items()}
        room = RowRoom.of(layouts, base.layers.projections, residents)
        assert room.numbers(base.layers.projections) == held
    for number, spec in enumerate(specs):  # and they do have room
        rows.admit(number, initial_rows(spec, base.layers.projections, torch.float32))


def test_with_enough_memory_all_train_at_once_in_long_forwards() -> None:
    limits = planned(
        [needs(f"a{n}") for n in range(30)],
        budget=1 << 50,
    )
    assert (limits.max_resident, limits.max_step_tokens) == (30, 8192)
    assert not limits.checkpoint_activations


def test_with_less_memory_adapters_wait_and_forwards_are_shorter() -> None:
    adapters = [needs(f"a{n}") for n in range(30)]
    found = [planned(adapters, budget=gib * GIBIBYTE, checkpoint=False) for gib in (9, 32, 64, 512)]
    residents = [one.max_resident for one in found]
    assert residents == sorted(residents)
    assert residents[0] < 30 == residents[-1]
    assert found[0].max_step_tokens < 8192 == found[-1].max_step_tokens


@pytest.mark.parametrize(("gib", "checkpointed"), [(64, False), (7, True)])
def test_activations_are_made_again_only_where_memory_is_short(
    gib: int, checkpointed: bool
) -> None:
    adapters = [needs(f"a{n}") for n in range(8)]
    limits = planned(adapters, budget=gib * GIBIBYTE, checkpoint=None)
    assert limits.checkpoint_activations is checkpointed


def test_one_that_does_not_fit_alone_is_refused_by_name_with_the_figures() -> None:
    adapters = [needs("small", rank=1), needs("large", rank=512)]
    with pytest.raises(SpecificationError) as caught:
        planned(adapters, budget=12 * GIBIBYTE)
    message = caught.value.message
    assert message.startswith("large: does not fit in memory even alone")
    for part in ("MiB for rows", "256 tokens", "12,288 MiB", "sequence_length", "memory_bytes"):
        assert part in message


def test_two_that_fit_alone_and_not_in_one_trainer_are_told_apart() -> None:
    long, wide = needs("long", rank=1, longest=4096), needs("wide", rank=200, longest=16)
    kept = activation_bytes(LARGE, [long, wide], estimated_runs(LARGE, [long, wide]))
    alone = [
        step_bytes(
            LARGE, [one], kept, max_resident=1, step_tokens=one.longest_tokens, checkpoint=False
        )
        for one in (long, wide)
    ]
    with pytest.raises(SpecificationError, match="fits in memory alone, but not in one job"):
        planned(
            [long, wide],
            budget=max(one.total for one in alone) + 1,
            checkpoint=False,
        )


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 16), st.integers(1, 4000), st.integers(1, 600)),
        min_size=1,
        max_size=6,
    ),
    st.integers(5, 40),
    st.sampled_from([True, False, None]),
)
def test_whatever_is_allowed_fits_the_budget(
    shapes: list[tuple[int, int, int]], gib: int, checkpoint: bool | None
) -> None:
    adapters = [
        needs(f"a{n}", rank, tokens, longest) for n, (rank, tokens, longest) in enumerate(shapes)
    ]
    try:
        limits = planned(
            adapters,
            budget=gib * GIBIBYTE,
            max_step_tokens=4096,
            checkpoint=checkpoint,
        )
    except SpecificationError:
        fewest = taken(
            adapters,
            max_resident=1,
            step_tokens=max(one.longest_tokens for one in adapters),
            checkpoint=checkpoint is not False,
        )
        assert fewest.total > gib * GIBIBYTE
        return
    assert 1 <= limits.max_resident <= len(adapters)
    assert limits.max_step_tokens >= max(one.longest_tokens for one in adapters)
    found = taken(
        adapters,
        max_resident=limits.max_resident,
        step_tokens=limits.max_step_tokens,
        checkpoint=limits.checkpoint_activations,
    )
    assert found == limits.needs
    assert found.total <= gib * GIBIBYTE


def test_needs_are_those_of_the_data_held_out_too() -> None:
    base = base_shape(tiny_model().config, torch.float32)
    spec = adapter("a", batch_size=3)
    training = sequences("a", 4)
    long = run_of(adapter("b")).data.training[4]
    found = adapter_needs(base, spec, AdapterData(training[:1], (long,)))
    assert found.longest_tokens == len(long.tokens) - 1 > len(training[0].tokens) - 1
    assert found.fewest_tokens == 3 * (len(training[0].tokens) - 1)
    assert found.step_tokens == 3 * (len(training[0].tokens) - 1)
    assert found.most_tokens == 3 * found.longest_tokens


def test_the_budget_is_the_settings_or_a_share_of_the_machine() -> None:
    assert memory_budget(TrainingSettings(memory_bytes=123)) == 123
    shared = memory_budget(TrainingSettings(num_workers=4))
    assert shared is not None
    assert shared == pytest.approx(usable_memory() / 8, abs=1)
    if not torch.cuda.is_available():
        assert memory_budget(TrainingSettings(gpus_per_worker=1)) is None


def test_a_control_groups_limit_is_below_the_machines(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/one\n")
    folder = tmp_path / "sys/fs/cgroup/pod"
    (folder / "one").mkdir(parents=True)
    (folder / "one/memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == usable_memory(tmp_path / "nowhere")
    (folder / "memory.max").write_text("1000000\n")
    assert usable_memory(tmp_path) == 1_000_000


SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=144,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    eos_token_id=2,
)
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def small_base(dtype: torch.dtype) -> FrozenBase:
    model = LlamaForCausalLM(SMALL).to(dtype).eval()
    loaded = LoadedBase(model, digest="0" * 64, directory=Path("nowhere"))
    return FrozenBase.adopt(loaded, max_tokens=256)


def small_needs(spec: AdapterSpec, dtype: torch.dtype, tokens: int) -> AdapterNeeds:
    shape = base_shape(SMALL, dtype)
    layouts = row_layouts(spec, shape.projections, shape.biased)
    return AdapterNeeds(spec.name, layouts, tokens, tokens, tokens, tokens)


def kept_by_a_step(base: FrozenBase, runs: Sequence[tuple[AdapterSpec, int]]) -> int:
    """Bytes for the backward of one forward in which each adapter has a run of so many tokens."""
    wide = torch.promote_types(base.dtype, torch.float32)
    projections = base.layers.projections
    layouts = [row_layouts(spec, projections, ()) for spec, _ in runs]
    rows = TrainableRows(base.layers, layouts, len(runs), wide, base.device)
    owned = []
    for number, (spec, tokens) in enumerate(runs):
        rows.admit(number, initial_rows(spec, projections, wide))
        sequence = TokenSequence((0,) * (tokens + 1), (True,) * (tokens + 1))
        owned.append(OwnedSequence(number, rows.slot_of(number), sequence))
    packed = pack(owned, rows.bank.resident_slots, base.device)
    lasting = [*base.weights(), *(block.weight_KW for block in rows.blocks.values())]
    there_before = {one.untyped_storage().data_ptr() for one in lasting}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    base.layers.begin_step(packed.plan)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        base.hidden_states(packed.tokens_T, packed.positions_T, packed.attention)
    return sum(
        one.untyped_storage().nbytes() for place, one in kept.items() if place not in there_before
    )


FAMILIES = [
    *(adapter(f"flora-r{rank}", rank=rank) for rank in (1, 4, 5, 8, 64)),
    *(adapter(f"lora-r{rank}", family="lora", rank=rank) for rank in (8, 64)),
    adapter("dora", family="dora", rank=4),
    adapter("ia3", family="ia3"),
]


@both_types
def test_the_estimate_of_a_run_is_near_what_the_model_keeps(dtype: torch.dtype) -> None:
    """Above it at every length, and not by much: a job that is admitted does not find out later."""
    base, shape = small_base(dtype), base_shape(SMALL, dtype)
    for spec in FAMILIES:
        measured = measure_run(base, spec)
        estimated = estimated_run(
            shape.projections, row_layouts(spec, shape.projections, shape.biased), dtype
        )
        for tokens in (1, 8, 15, 16, 32, 64, 65, 128, 1000):
            ratio = estimated.of(tokens) / measured.of(tokens)
            assert 1.0 <= ratio <= 1.75, (spec.name, tokens, ratio)


@both_types
@pytest.mark.parametrize(
    "mix",
    [
        [(adapter("r4"), 4, 64)],
        [(adapter("r5"), 5, 64)],
        [(adapter("r8"), 8, 32)],
        [(adapter("r5"), 5, 8)],
        [(adapter("lora", family="lora"), 8, 8)],
        [(adapter("f"), 8, 128), *((adapter(f"d{n}", family="dora"), 4, 128) for n in range(3))],
        [(adapter("long"), 1, 128), (adapter("short", family="lora"), 8, 12)],
    ],
    ids=["r4", "r5", "r8 x 32", "r5 x 8", "lora x 8", "flora and dora", "long and short"],
)
def test_what_a_stream_keeps_is_said_in_whichever_mode_its_runs_are(
    mix: list[tuple[AdapterSpec, int, int]], dtype: torch.dtype
) -> None:
    """Row mode keeps twice what weight mode does, gathered rows ten times, and DoRA beside FLoRA more than FLoRA."""
    base, shape = small_base(dtype), base_shape(SMALL, dtype)
    alone = len(mix) == 1
    runs = [
        (spec.model_copy(update={"rank": rank, "name": f"{spec.name}-{copy}"}), tokens)
        for spec, rank, tokens in mix
        for copy in range(4 if alone else 1)
    ]
    needed = [small_needs(spec, dtype, tokens) for spec, tokens in runs]
    measured = activation_bytes(
        shape, needed, {spec.name: measure_run(base, spec) for spec, _ in runs}
    )
    names, total = [one.name for one in needed], sum(tokens for _, tokens in runs)
    said = measured.of(total, names, len(runs), checkpointed=False)
    # Modes side by side in one step make some tensors twice, and attention pads: SLACK is for that.
    least = 0.99 if alone else 1 / (1 + SLACK)
    assert least <= said / kept_by_a_step(base, runs) <= 1.1
    estimated = activation_bytes(shape, needed, estimated_runs(shape, needed))
    assert said <= estimated.of(total, names, len(runs), checkpointed=False)


@pytest.mark.parametrize("wanted", ["auto", True, False])
def test_a_base_is_fitted_by_what_was_measured_on_it(wanted: bool | str) -> None:
    run = run_of(adapter("a", rank=4))
    loaded = LoadedBase(tiny_model(), digest="0" * 64, directory=Path("nowhere"))
    how = TrainingSettings(memory_bytes=8 * GIBIBYTE, checkpoint_activations=wanted)
    fitted = FittedBase.adopt(loaded, [run.spec], how)
    limits = fitted.fit([run.spec], {"a": run.data})
    assert limits is not None
    assert limits.checkpoint_activations is (wanted is True)
    assert limits.max_resident == 1
    shape = base_shape(tiny_model().config, torch.float32)
    needed = [adapter_needs(shape, run.spec, run.data)]
    kept = activation_bytes(shape, needed, {"a": measure_run(fitted.base, run.spec)})
    expected = kept.of(limits.max_step_tokens, ["a"], 1, checkpointed=wanted is True)
    assert limits.needs.activations == max(round(BACKWARD * expected), kept.measuring)


LONG = AdapterData((TokenSequence((0,) * 4001, (True,) * 4001),))


def underestimated(monkeypatch: pytest.MonkeyPatch, wanted: bool | str) -> StepLimits:
    """Of a worker that measures half as much again as its driver estimated, which was all of the budget."""
    spec = adapter("a", sequence_length=4001, batch_size=1)
    config = LlamaConfig(**{**SMALL.to_dict(), "max_position_embeddings": 4096})
    needed = [adapter_needs(base_shape(config, torch.float32), spec, LONG)]
    shape = base_shape(config, torch.float32)
    estimated = activation_bytes(shape, needed, estimated_runs(shape, needed))
    taken = step_bytes(shape, needed, estimated, max_resident=1, step_tokens=4000, checkpoint=False)
    how = TrainingSettings(memory_bytes=taken.total, checkpoint_activations=wanted)
    before = trainer_limits(config, [spec], {"a": LONG}, torch.float32, how)
    assert before is not None
    assert not before.checkpoint_activations
    run = RunBytes(((2, 3 * estimated.per_token), (64, 96 * estimated.per_token)))
    monkeypatch.setattr("training.job_memory.measure_run", lambda *_: run)
    model = LlamaForCausalLM(config).eval()
    loaded = LoadedBase(model, digest="0" * 64, directory=Path("nowhere"))
    fitted = FittedBase.adopt(loaded, [spec], how)
    found = fitted.fit([spec], {"a": LONG})
    assert found is not None
    assert fitted.base._checkpointed._is_on is found.checkpoint_activations
    return found


def test_a_worker_that_measures_more_computes_activations_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert underestimated(monkeypatch, "auto").checkpoint_activations


def test_a_job_that_was_admitted_is_not_refused_by_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not underestimated(monkeypatch, False).checkpoint_activations


def test_a_model_that_cannot_compute_activations_again_is_refused_before_any_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.job_memory.GradientCheckpointingLayer", type(None))
    how = TrainingSettings(memory_bytes=8 * GIBIBYTE, checkpoint_activations=True)
    run = run_of(adapter("a"))
    with pytest.raises(SpecificationError, match="type llama does not say which"):
        trainer_limits(tiny_model().config, [run.spec], {"a": run.data}, torch.float32, how)
