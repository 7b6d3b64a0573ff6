"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.training.tiny_jobs import Recorder, adapter, tiny_base, trained, trainer
from training.activation_memory import measure_run
from training.batches import OwnedSequence, pack
from training.tokens import TokenSequence

SPECS = [
    adapter("flora", rank=2, steps=6),
    adapter("lora", family="lora", rank=4, learning_rate=5e-3, steps=6),
    adapter("dora", family="dora", rank=2, learning_rate=5e-3, steps=6),
    adapter("ia3", family="ia3", learning_rate=3e-2, steps=6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_activations_computed_again_is_the_same_to_the_bit(
    dtype: torch.dtype,
) -> None:
    kept, again = (
        trained(*SPECS, dtype=dtype, checkpoint_activations=checkpointed)
        for checkpointed in (False, True)
    )
    for spec in SPECS:
        assert kept.losses(spec.name) == again.losses(spec.name)
        rows, other = kept.published[spec.name], again.published[spec.name]
        for path, module in rows.modules.items():
            for name, tensor in module.tensors().items():
                assert torch.equal(tensor, other.modules[path].tensors()[name])


def test_a_backward_after_another_step_began_is_refused() -> None:
    """It would compute the forward of the one with the adapters of the other."""
    training = trainer(SPECS[0], recorder=Recorder(), checkpoint_activations=True)
    training.start()
    base = training._base
    slot = training.rows.slot_of(0)
    tokens = TokenSequence((3, 4, 5, 6), (True,) * 4)
    packed = pack([OwnedSequence(0, slot, tokens)], training.rows.bank.resident_slots, base.device)
    base.layers.begin_step(packed.plan)
    hidden_TH = base.hidden_states(packed.tokens_T, packed.positions_T, packed.attention)
    base.layers.begin_step(packed.plan)
    with pytest.raises(RuntimeError, match="another step"):
        hidden_TH.sum().backward()


def test_what_a_run_keeps_is_measured_whatever_the_base_was_told() -> None:
    plain, checkpointed = (
        measure_run(tiny_base(checkpoint_activations=on), adapter("a", rank=4))
        for on in (False, True)
    )
    assert plain == checkpointed, "the answer is about the model, not about how it was adopted"
    assert plain.per_token > 2 * 4 * 32 * 4, "four different inputs of projections in each layer"


def test_a_base_changes_between_keeping_and_computing_again() -> None:
    training = trainer(SPECS[0], recorder=Recorder())
    training.start()
    base = training._base
    tokens = TokenSequence((3, 4, 5, 6), (True,) * 4)
    owned = [OwnedSequence(0, training.rows.slot_of(0), tokens)]
    packed = pack(owned, training.rows.bank.resident_slots, base.device)

    def saved() -> int:
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        base.layers.begin_step(packed.plan)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            base.hidden_states(packed.tokens_T, packed.positions_T, packed.attention)
        return len(kept)

    everything = saved()
    base.checkpoint_activations(True)
    assert saved() < everything / 4
    base.checkpoint_activations(False)
    assert saved() == everything
