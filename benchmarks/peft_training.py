"""The peer of training: PEFT's HiRA, which is FLoRA with an offset of 1, one adapter after another in a plain loop."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from peft import HiraConfig, get_peft_model

from training.tokens import TokenSequence
from workers.models.loading import load_base

CLIP_NORM = 1.0


class PeftLoop:
    """One adapter in a model of its own, as PEFT's documentation trains it: AdamW and a clip of its parameters.

    Args:
        targets: ends of the paths of the adapted layers.
    """

    def __init__(
        self,
        base: Path,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        targets: list[str],
    ) -> None:
        model = load_base(str(base), dtype, device).model
        self._model = get_peft_model(model, HiraConfig(r=rank, target_modules=targets))
        self._model.train()
        self._trained = [each for each in self._model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=8e-3, weight_decay=0.0)
        self._device = device

    def seconds(self, sequence: TokenSequence, steps: int) -> float:
        """Time of so many steps on one sequence, every token of it learnt but the first."""
        ids = torch.tensor([sequence.tokens], device=self._device)
        began = time.perf_counter()
        for _ in range(steps):
            self._optimizer.zero_grad()
            loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trained, CLIP_NORM)
            self._optimizer.step()
            loss.item()
        return time.perf_counter() - began
