"""The fast `ModelRunner`: the weights, adapters and cache of `HfRunner`, the forward of our own decoder."""

from __future__ import annotations

from torch import Tensor

from workers.config import EngineSettings
from workers.models.arithmetic import Arithmetic
from workers.models.hf import HfRunner
from workers.models.loading import LoadedBase
from workers.models.native.decoder import NativeDecoder
from workers.models.runner import StepInput


class NativeRunner(HfRunner):
    """As `HfRunner`, for models of the Llama shape.

    Raises:
        InvalidRequestError: the model is of another shape; says what is lacking.
    """

    def __init__(
        self, base: LoadedBase, settings: EngineSettings, arithmetic: Arithmetic | None = None
    ) -> None:
        super().__init__(base, settings, arithmetic)
        self._decoder = NativeDecoder(
            base.model,
            self._arithmetic.decoder,
            max_tokens=self.shape.max_positions,
            head_dim=self.shape.head_dim,
            make_linear=self._arithmetic.make_linear,
            epilogue=self._arithmetic.epilogue,
        )

    def _logits(self, step: StepInput) -> Tensor:
        return self._decoder.logits(
            step.token_ids_T, step.positions_T, self._attention, step.logits_of_L
        )
