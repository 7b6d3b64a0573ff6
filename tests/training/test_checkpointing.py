"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import pytest
import torch

from tests.training.tiny_jobs import Recorder, adapter, tiny_base, trained, trainer
from training.activation_memory import measure_activations
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


def test_what_a_token_keeps_is_measured_and_much_less_when_checkpointed() -> None:
    plain, checkpointed = (
        measure_activations(tiny_base(checkpoint_activations=on), adapter("a", rank=4))
        for on in (False, True)
    )
    assert plain == checkpointed, "the answer is about the model, not about how it was adopted"
    hidden = 32 * 4
    assert plain.per_token > 2 * 4 * hidden, "at least four different inputs of projections a layer"
    assert plain.per_token_checkpointed == 2 * hidden + -(-plain.per_token // 2)
    assert plain.of(100, checkpointed=False) == 100 * plain.per_token
