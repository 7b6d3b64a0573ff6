"""The fast `ModelRunner`: the weights, adapters and cache of `HfRunner`, the forward of our own decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.attention.pages import PagedAttention
from workers.config import EngineSettings
from workers.models.arithmetic import Arithmetic
from workers.models.decode_graphs import DecodeGraphs, GpuRecorder, Recorder
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
        self.graphs: DecodeGraphs | None = None
        if settings.decode_graphs and self.device.type == "cuda":
            self.use_graphs(GpuRecorder())

    def use_graphs(self, recorder: Recorder) -> None:
        """Replay decode steps from now on. No effect without kernels over pages, which graphs are made of."""
        if self._arithmetic.has_kernels and isinstance(self._attention, PagedAttention):
            self.graphs = DecodeGraphs(
                self._logits_of, self._attention, self._layers, recorder, self.device
            )

    def forward(self, step: StepInput) -> Tensor:
        logits_LV = None if self.graphs is None else self.graphs.logits(step)
        return super().forward(step) if logits_LV is None else logits_LV

    def _logits_of(self, token_ids_T: Tensor, positions_T: Tensor, wanted_L: Tensor) -> Tensor:
        with torch.inference_mode():
            logits_LV = self._decoder.logits(token_ids_T, positions_T, self._attention, wanted_L)
            return logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32))

    def _logits(self, step: StepInput) -> Tensor:
        return self._decoder.logits(
            step.token_ids_T, step.positions_T, self._attention, step.logits_of_L
        )
