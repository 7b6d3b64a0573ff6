"""What a forward keeps for its backward, measured on the model itself by short forwards of an adapter.

Between two lengths at which a mode begins it is linear in the tokens of a run: attention keeps no scores, and logits
are made in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from training.activation_bytes import RunBytes, longest_by_token, run_lengths
from training.batches import OwnedSequence, pack
from training.frozen_base import FrozenBase
from training.initial_rows import initial_rows, row_layouts
from training.spec import AdapterSpec
from training.tokens import TokenSequence
from training.trainable_rows import TrainableRows

_PROBE_TOKENS = 64  # of one sequence


def measure_run(base: FrozenBase, spec: AdapterSpec) -> RunBytes:
    """What runs of an adapter keep, whatever their length.

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
    of_one = _kept_bytes(
        base, rows, 1
    )  # many rows for each token would take much memory to look at
    by_token = longest_by_token(layouts, base.dtype)
    return RunBytes(
        tuple(
            (length, length * of_one if length <= by_token else _kept_bytes(base, rows, length))
            for length in run_lengths(layouts, base.dtype)
        )
    )


def _kept_bytes(base: FrozenBase, rows: TrainableRows, num_tokens: int) -> int:
    """Of all storages that the backward of a run's forward would read, but for weights and rows."""
    owned = [
        OwnedSequence(0, rows.slot_of(0), TokenSequence((0,) * (n + 1), (True,) * (n + 1)))
        for n in _sequences(num_tokens)
    ]
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


def _sequences(num_tokens: int) -> list[int]:
    """All of one length, so that attention pads nothing, and none longer than a probe."""
    length = max(n for n in range(1, _PROBE_TOKENS + 1) if num_tokens % n == 0)
    return [length] * (num_tokens // length)
