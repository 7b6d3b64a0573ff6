"""What a forward keeps for its backward, measured on the model itself by a short forward of one adapter.

It is linear in the tokens of the stream: attention keeps no scores, and logits are made in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from training.batches import OwnedSequence, pack
from training.frozen_base import FrozenBase
from training.initial_rows import initial_rows, row_layouts
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainable_rows import TrainableRows

_PROBE_SEQUENCES, _PROBE_TOKENS = 2, 64


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes that a token of the stream keeps from its forward to its backward."""

    per_token: int
    """Of all decoder layers."""
    per_token_checkpointed: int
    """The inputs of all layers, and everything of the one layer that is being computed again."""

    def of(self, num_tokens: int, *, checkpointed: bool) -> int:
        """Of one forward of so many tokens; logits apart."""
        return num_tokens * (self.per_token_checkpointed if checkpointed else self.per_token)


def measure_activations(base: FrozenBase, spec: AdapterSpec) -> ActivationBytes:
    """Measure with an adapter, which should be the one of its job with the most rows.

    The base's layers are bound to rows of this measurement afterwards: make the trainer later. A base that checkpoints
    its activations answers the same.

    Raises:
        SpecificationError: the adapter targets modules the model does not have.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    projections = base.layers.projections
    layouts = row_layouts(spec, projections, base.layers.biases)
    rows = TrainableRows(base.layers, [layouts], 1, dtype, base.device)
    rows.admit(0, initial_rows(spec, projections, dtype))
    per_token = -(-_kept_bytes(base, rows) // (_PROBE_SEQUENCES * _PROBE_TOKENS))
    boundaries = base.num_layers * base.hidden_size * base.dtype.itemsize
    return ActivationBytes(per_token, boundaries + -(-per_token // base.num_layers))


def _kept_bytes(base: FrozenBase, rows: TrainableRows) -> int:
    """Of all storages that the backward of a forward would read, but for weights and rows."""
    tokens = TokenSequence((0,) * (_PROBE_TOKENS + 1), (True,) * (_PROBE_TOKENS + 1))
    owned = [OwnedSequence(0, rows.slot_of(0), tokens)] * _PROBE_SEQUENCES
    packed = pack(owned, rows.bank.resident_slots, base.device)
    lasting = [*base.weights(), *(block.weight_KW for block in rows.blocks.values())]
    places = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    kept: dict[int, Tensor] = {}  # by address; held, or an address might come twice

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in places:
            kept[place] = tensor.detach()
        return tensor

    base.layers.begin_step(packed.plan)
    with saved_tensors_hooks(keep, lambda tensor: tensor), base.keeping_activations():
        base.hidden_states(packed.tokens_T, packed.positions_T, packed.attention)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
