"""Activation checkpointing: a decoder layer keeps its input only, and computes the rest again in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from storage.errors import InvalidRequestError
from workers.row_form.adapted_linear import AdapterLayers


class CheckpointedLayers:
    """The layers of a decoder, changed in place. The same arithmetic runs again, so gradients are the same to the bit.

    What a layer computes again is the step it computed first: its backward runs before `layers` begins another step,
    or raises RuntimeError. Layers have no random part, as a frozen model in evaluation mode has none. Off at first.
    """

    def __init__(self, decoder: nn.Module, layers: AdapterLayers) -> None:
        self._layers = layers
        self._name = type(decoder).__name__
        self._is_on = False
        self._found = [
            one for one in decoder.modules() if isinstance(one, GradientCheckpointingLayer)
        ]
        for layer in self._found:
            layer.forward = self._recomputed(layer.forward)

    def switch(self, is_on: bool) -> None:
        """From the next forward on.

        Raises:
            InvalidRequestError: the model does not say which of its modules are its layers.
        """
        if is_on and not self._found:
            raise InvalidRequestError(
                f"{self._name} does not say which of its modules are its layers, so their activations "
                "cannot be computed again; set checkpoint_activations to false",
                param="checkpoint_activations",
            )
        self._is_on = is_on

    @contextmanager
    def off(self) -> Iterator[None]:
        """Activations of forwards in here are kept."""
        before, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = before

    def _recomputed(self, forward: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            if not self._is_on:
                return forward(*arguments, **named)
            step = self._layers.step

            def compute(*again: Any, **named_again: Any) -> Any:
                if self._layers.step is not step:
                    raise RuntimeError("another step began before the backward of this one")
                return forward(*again, **named_again)

            return checkpoint(
                compute, *arguments, use_reentrant=False, preserve_rng_state=False, **named
            )

        return run
