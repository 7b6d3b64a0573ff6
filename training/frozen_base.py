"""The model that all adapters of a job share: frozen, its linear layers adapted, its attention packed.

Shape legend: T tokens of the stream, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from storage.errors import InvalidRequestError
from training.checkpointed_layers import CheckpointedLayers
from training.packed_attention import PackedAttention
from workers.models.arithmetic import choose_trained_loops
from workers.models.attention_hook import BACKEND_ARGUMENT, adopt_attention
from workers.models.loading import LoadedBase
from workers.models.wrapping import wrap_linears
from workers.row_form.adapted_linear import AdapterLayers
from workers.row_form.adapted_product import TrainedProduct
from workers.row_form.cost import training_cost


@dataclass(frozen=True, eq=False)
class FrozenBase:
    """One forward in two halves, so that logits are made only where they are wanted."""

    layers: AdapterLayers
    head: nn.Module  # hidden_LH → logits_LV
    dtype: torch.dtype
    device: torch.device
    digest: str
    _decoder: nn.Module
    _checkpointed: CheckpointedLayers

    @classmethod
    def adopt(
        cls, base: LoadedBase, *, max_tokens: int, checkpoint_activations: bool = False
    ) -> FrozenBase:
        """Prepare a loaded model for training; it is changed in place.

        Args:
            max_tokens: the longest sequence it will see.
            checkpoint_activations: as the method of that name.

        Raises:
            InvalidRequestError: names what the model needs and training does not have.
        """
        model = base.model
        adopt_attention(model, max_tokens)
        layers = wrap_linears(
            model,
            training_cost(model.dtype),
            product=TrainedProduct(choose_trained_loops(model.dtype, model.device)),
        )
        frozen = cls(
            layers=layers,
            head=model.get_output_embeddings(),
            dtype=model.dtype,
            device=model.device,
            digest=base.digest,
            _decoder=model.get_decoder(),
            _checkpointed=CheckpointedLayers(model.get_decoder(), layers),
        )
        frozen._refuse_other_heads(model)
        frozen.checkpoint_activations(checkpoint_activations)
        return frozen

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self._decoder.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]

    @property
    def hidden_size(self) -> int:
        return int(self._decoder.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def weights(self) -> Iterator[Tensor]:
        """All tensors that were there before any step."""
        yield from self._decoder.parameters()
        yield from self._decoder.buffers()
        yield from map(self.layers.base_weight, self.layers.layers)

    def checkpoint_activations(self, is_on: bool) -> None:
        """From the next forward on, a decoder layer keeps its input only, or everything.

        The backward computes the rest again, which takes about a third longer. `training.activation_memory` says what
        that saves.

        Raises:
            InvalidRequestError: the model does not say which of its modules are its layers.
        """
        self._checkpointed.switch(is_on)

    def keeping_activations(self) -> AbstractContextManager[None]:
        """Around forwards that are to keep them, whatever the base was told."""
        return self._checkpointed.off()

    def hidden_states(
        self, tokens_T: Tensor, positions_T: Tensor, attention: PackedAttention
    ) -> Tensor:
        """The decoder's last hidden states_TH, under the step its layers were told of."""
        arguments: dict[str, Any] = {BACKEND_ARGUMENT: attention}
        output = self._decoder(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, **arguments
        )
        hidden_1TH: Tensor = output.last_hidden_state
        return hidden_1TH[0]

    @torch.no_grad()
    def _refuse_other_heads(self, model: PreTrainedModel) -> None:
        """Some models scale or cap their logits after the head; leaving that out would train another model."""
        # Several tokens: that of the padding embeds to zeros, which no scale changes.
        probe_T = torch.arange(8, device=self.device)
        attention = PackedAttention([len(probe_T)], self.device)
        self.layers.begin_step(None)
        halves_LV = self.head(self.hidden_states(probe_T, probe_T, attention))
        arguments: dict[str, Any] = {BACKEND_ARGUMENT: attention}
        whole_1LV = model(
            input_ids=probe_T[None], position_ids=probe_T[None], use_cache=False, **arguments
        ).logits
        if (halves_LV - whole_1LV[0]).abs().max() > 1e-2 * halves_LV.abs().max():
            raise InvalidRequestError(
                f"{type(model).__name__} changes its logits after the output layer, which training does not know",
                param="base",
            )
