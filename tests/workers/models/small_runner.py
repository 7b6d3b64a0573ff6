"""One forward of a runner: whole prompts, each with an adapter or none, logits at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from storage.adapter_rows import AdapterRows
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.config import EngineSettings
from workers.models.hf import HfRunner
from workers.models.loading import LoadedBase
from workers.models.native.runner import NativeRunner
from workers.models.runner import SequenceSpan, StepInput
from workers.row_form.step_plan import Segment, plan_step

DEVICE = torch.device("cpu")
RUNNERS = {"hf": HfRunner, "native": NativeRunner}
"""Every back end that is held to the same oracles."""


class SmallRunner:
    """A runner and its bank; takes the model over."""

    def __init__(
        self, model: PreTrainedModel, *, max_tokens: int = 64, kind: str = "hf", num_slots: int = 16
    ) -> None:
        settings = EngineSettings(max_sequences=num_slots, max_sequence_tokens=max_tokens)
        self.runner = RUNNERS[kind](LoadedBase(model, "0" * 64, Path("nowhere")), settings)
        self.bank = AdapterBank(
            self.runner.shape.projections,
            num_rows=128,
            num_slots=num_slots,
            dtype=self.runner.dtype,
            device=DEVICE,
            biases=self.runner.biases,
            base_weight=self.runner.base_weight,
        )
        self.runner.bind(self.bank)

    def load(self, adapters: Mapping[AdapterVersion, AdapterRows]) -> None:
        for version, rows in adapters.items():
            self.bank.load(version, rows)

    def step(
        self, parts: Sequence[tuple[SequenceSpan, Tensor, AdapterVersion | None]]
    ) -> list[Tensor]:
        """The logits at every token of each part; its tokens are all new ones of the span."""
        slots = [None if version is None else self.bank.find(version) for *_, version in parts]
        assert all(
            slot is not None or version is None
            for slot, (*_, version) in zip(slots, parts, strict=True)
        )
        plan = plan_step(
            [
                Segment(span.num_new, () if slot is None else ((slot, 1.0),))
                for (span, _, _), slot in zip(parts, slots, strict=True)
            ],
            self.bank.resident_slots,
            DEVICE,
        )
        spans = tuple(span for span, _, _ in parts)
        logits_TV = self.runner.forward(
            StepInput(
                token_ids_T=torch.cat([tokens for _, tokens, _ in parts]),
                positions_T=torch.cat(
                    [torch.arange(span.num_cached, span.num_total) for span in spans]
                ),
                spans=spans,
                plan=plan,
                logits_of_L=torch.arange(plan.num_tokens),
            )
        )
        return list(logits_TV.clone().split([span.num_new for span in spans]))

    def prompts(self, prompts: Sequence[tuple[Tensor, AdapterVersion | None]]) -> list[Tensor]:
        """Whole prompts in one step."""
        return self.step(
            [
                (SequenceSpan(slot, 0, len(tokens)), tokens, version)
                for slot, (tokens, version) in enumerate(prompts)
            ]
        )
