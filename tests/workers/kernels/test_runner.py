"""A whole model on the kernels, in Triton's interpreter: the answers of the same model on torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import random_adapter
from tests.workers.models.small_runner import SmallRunner
from tests.workers.models.test_hf import tiny
from workers.models import hf
from workers.models.arithmetic import kernel_arithmetic
from workers.models.runner import SequenceSpan

FLORA, LORA, SCALED = (AdapterVersion(f"{number:064x}") for number in range(3))


class AnyRunner(SmallRunner):
    def __init__(self, kind: str) -> None:
        model = tiny(LlamaConfig, torch.float32, num_hidden_layers=1, attention_bias=True)
        super().__init__(model, kind=kind, num_slots=8)
        shapes = self.runner.shape.projections
        self.load({
            FLORA: random_adapter(shapes, "flora", lambda number: 1 + number % 3, seed=1),
            LORA: random_adapter(shapes, "lora+bias", 4, seed=2),
            SCALED: random_adapter(shapes, "dora", 2, seed=3),
        })  # fmt: skip

    def answers(self, adapters: list[AdapterVersion | None]) -> Tensor:
        """Logits of prompts, one of them long, and of one token more of each."""
        generator = torch.Generator().manual_seed(0)
        lengths = [3, 20, 2, 1][: len(adapters)]
        tokens = [torch.randint(3, 90, (length + 1,), generator=generator) for length in lengths]
        first = self.prompts([(one[:-1], who) for one, who in zip(tokens, adapters, strict=True)])
        second = self.step(
            [
                (SequenceSpan(slot, length, 1), one[-1:], who)
                for slot, (length, one, who) in enumerate(
                    zip(lengths, tokens, adapters, strict=True)
                )
            ]
        )
        return torch.cat([*first, *second])


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_answers_are_those_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixes: list[list[AdapterVersion | None]] = [
        [FLORA, LORA, None, SCALED],
        [LORA, SCALED, None],
        [None],
    ]
    wanted = [AnyRunner(kind).answers(mix) for mix in mixes]
    monkeypatch.setattr(hf, "choose_arithmetic", lambda *_, **__: kernel_arithmetic())
    runner = AnyRunner(kind)
    for mix, expected in zip(mixes, wanted, strict=True):
        got = runner.answers(mix)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(wanted[0][:23], wanted[1][:23], rtol=0, atol=0.05)
