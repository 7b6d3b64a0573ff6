"""The type engines serve in by default, the only one with packed weights and a dot product of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from workers.config import EngineSettings
from workers.models.hf import HfRunner
from workers.models.loading import LoadedBase
from workers.models.native.runner import NativeRunner
from workers.models.runner import SequenceSpan, StepInput
from workers.row_form.step_plan import Segment, plan_step

CPU = torch.device("cpu")
PROMPTS = [torch.arange(40) * 7 % 61, torch.arange(17) * 5 % 61, torch.arange(33) * 3 % 61]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    return model.to(torch.bfloat16).eval()


def theirs(model: LlamaForCausalLM) -> list[Tensor]:
    """transformers' logits at the last token, in float32 arithmetic over the same weights."""
    wide = LlamaForCausalLM(model.config).eval()
    wide.load_state_dict(model.state_dict())
    with torch.inference_mode():
        return [wide(prompt[None]).logits[0, -1] for prompt in PROMPTS]


def ours(runner: HfRunner) -> list[Tensor]:
    """The same: prompts but for their last tokens in one step, then all last tokens in a decode step."""

    def step(spans: list[SequenceSpan], tokens: list[Tensor]) -> Tensor:
        lengths = torch.tensor([span.num_new for span in spans])
        return runner.forward(
            StepInput(
                token_ids_T=torch.cat(tokens),
                positions_T=torch.cat(
                    [torch.arange(span.num_cached, span.num_total) for span in spans]
                ),
                spans=tuple(spans),
                plan=plan_step([Segment(span.num_new) for span in spans], (), CPU),
                logits_of_L=lengths.cumsum(0) - 1,
            )
        )

    lengths = [len(prompt) - 1 for prompt in PROMPTS]
    step(
        [SequenceSpan(slot, 0, length) for slot, length in enumerate(lengths)],
        [prompt[:-1] for prompt in PROMPTS],
    )
    last = step(
        [SequenceSpan(slot, length, 1) for slot, length in enumerate(lengths)],
        [prompt[-1:] for prompt in PROMPTS],
    )
    return list(last)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", [HfRunner, NativeRunner])
def test_logits_are_transformers_up_to_bfloat16(kind: type[HfRunner], compiled: bool) -> None:
    model = llama()
    expected = theirs(model)
    settings = EngineSettings(
        max_sequences=4, max_sequence_tokens=64, dtype="bfloat16", compiled=compiled
    )
    logits = ours(kind(LoadedBase(model, "0" * 64, Path("nowhere")), settings))
    scale = max(float(one.abs().max()) for one in expected)
    for mine, other in zip(logits, expected, strict=True):
        assert float((mine - other).abs().max()) <= 2**-6 * scale
        # Another prompt's answer is far outside the bound.
    assert float((logits[0] - expected[1]).abs().max()) > 2**-3 * scale
