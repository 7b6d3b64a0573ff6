"""The `hf` runner against the models' own forward, and its refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from storage.errors import InvalidRequestError
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import random_adapter
from tests.workers.models.small_runner import SmallRunner
from workers.models.runner import SequenceSpan

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(
    kind: type[PretrainedConfig], dtype: torch.dtype = torch.float64, **changes: object
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = kind(**{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny(LlamaConfig),
    "llama-biased": lambda: tiny(LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral-wide-window": lambda: tiny(MistralConfig, sliding_window=64),
    "qwen2": lambda: tiny(Qwen2Config),
    "qwen3": lambda: tiny(Qwen3Config),
    "gemma": lambda: tiny(GemmaConfig),
    "phi3-fused": lambda: tiny(Phi3Config),
    "olmo2": lambda: tiny(Olmo2Config),
    "gpt-neox": lambda: tiny(GPTNeoXConfig),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own_however_the_tokens_come(name: str) -> None:
    model = MODELS[name]()
    tokens = torch.randint(0, 90, (2, 20))
    with torch.no_grad():
        expected = copy.deepcopy(model)(tokens).logits
    first, second = tokens
    runner = SmallRunner(model)
    got_first, got_second = runner.prompts([(first[:11], None), (second[:3], None)])
    pieces = [(0, 11, 1, 3, 6), (0, 12, 1, 9, 1), (0, 13, 7, 10, 10)]
    for _, at, count, second_at, second_count in pieces:
        one, other = runner.step(
            [
                (SequenceSpan(0, at, count), first[at : at + count], None),
                (
                    SequenceSpan(1, second_at, second_count),
                    second[second_at : second_at + second_count],
                    None,
                ),
            ]
        )
        got_first, got_second = torch.cat([got_first, one]), torch.cat([got_second, other])
    torch.testing.assert_close(got_first, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(got_second, expected[1], rtol=0, atol=1e-6)


def _with_an_experts_layer() -> PreTrainedModel:
    """Some of the tokens go through it, or as here none."""
    model = tiny(LlamaConfig)
    model.model.layers[1].mlp.expert = torch.nn.Linear(32, 32)
    return model


def _counting_its_own_positions() -> PreTrainedModel:
    model = tiny(LlamaConfig)
    forward = model.forward
    model.forward = lambda input_ids, **arguments: forward(input_ids, **arguments)
    return model


def _seeing_pictures() -> PreTrainedModel:
    text = {**SMALL, "sliding_window": 64}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
    config = Gemma3Config(text_config=text, vision_config={**vision, "num_attention_heads": 4})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "sliding window": (lambda: tiny(MistralConfig, sliding_window=16), "sliding window of 16"),
    "layers with a window": (
        lambda: tiny(Gemma2Config, sliding_window=16, attn_logit_softcapping=None),
        "sliding_attention",
    ),
    "soft cap": (
        lambda: tiny(Gemma2Config, layer_types=["full_attention"] * 2),
        "soft-capped",
    ),
    "sinks": (
        lambda: tiny(
            GptOssConfig,
            dtype=torch.float32,
            layer_types=["full_attention"] * 2,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "attention sinks",
    ),
    "alibi": (lambda: tiny(BloomConfig, n_head=4, n_layer=2), "an attention of its own"),
    "recurrence": (
        lambda: tiny(MambaConfig, state_size=4),
        "a recurrent state",
    ),
    "convolution": (
        lambda: tiny(Lfm2Config, layer_types=["conv", "full_attention"]),
        "layers of type conv",
    ),
    "cross attention": (
        lambda: tiny(GPT2Config, add_cross_attention=True),
        "cross attention",
    ),
    "pictures": (_seeing_pictures, "inputs other than text"),
    "experts": (_with_an_experts_layer, r"every token through model\.layers\.1\.mlp\.expert"),
    "positions": (_counting_its_own_positions, "positions that it counts itself"),
    "rope of some layers that looks at the batch": (
        lambda: tiny(
            Gemma3TextConfig,
            sliding_window=64,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        "dynamic rotary scaling",
    ),
    "rope that looks at the batch": (
        lambda: tiny(
            LlamaConfig,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "dynamic rotary scaling",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_attention_lacks_is_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(InvalidRequestError, match=message):
        SmallRunner(make())


def test_a_step_without_adapters_does_not_look_at_the_bank() -> None:
    tokens = torch.randint(0, 90, (9,))
    (expected,) = SmallRunner(tiny(LlamaConfig)).prompts([(tokens, None)])
    runner = SmallRunner(tiny(LlamaConfig))
    for module in runner.bank.modules.values():
        module.in_rows_NI.fill_(torch.nan)
        module.out_rows_NO.fill_(torch.nan)
    (got,) = runner.prompts([(tokens, None)])
    assert torch.equal(got, expected)


def test_logits_are_float32_for_16_bit_models_and_only_where_wanted() -> None:
    runner = SmallRunner(tiny(LlamaConfig, torch.bfloat16))
    (logits_TV,) = runner.prompts([(torch.arange(5), None)])
    assert (logits_TV.dtype, logits_TV.shape) == (torch.float32, (5, 90))


@pytest.mark.parametrize("broken", ["huge", "not finite"])
def test_a_broken_neighbour_leaves_the_bits_of_others_alone(broken: str) -> None:
    """Same batch, same shapes: only the values of the neighbour's rows differ."""
    seen = []
    for damage in (False, True):
        runner = SmallRunner(tiny(LlamaConfig, torch.float32))
        shapes = runner.runner.shape.projections
        versions = [AdapterVersion(f"{i:064x}") for i in range(4)]
        families = ("flora", "flora", "lora", "flora0")
        runner.load(
            {
                version: random_adapter(shapes, family, 2, seed=i)
                for i, (version, family) in enumerate(zip(versions, families, strict=True))
            }
        )
        if damage:
            # Past the bank's own check, as a bit that flips in memory would: every row of adapter 1.
            value = 3e38 if broken == "huge" else torch.nan
            for path, pages in runner.bank.pages_of(versions[1]).items():
                runner.bank.modules[path].in_rows_NI[list(pages.in_pages)] = value
                runner.bank.modules[path].out_rows_NO[list(pages.out_pages)] = value
        prompts = [torch.arange(i, i + 6) for i in range(5)]
        users = [None, *versions]
        first = runner.prompts(list(zip(prompts, users, strict=True)))
        again = runner.step(
            [
                (SequenceSpan(slot, 6, 1), torch.tensor([slot]), user)
                for slot, user in enumerate(users)
            ]
        )
        seen.append([torch.cat(pair) for pair in zip(first, again, strict=True)])
    for index, (healthy, beside_broken) in enumerate(zip(*seen, strict=True)):
        if index == 2:
            assert not torch.isfinite(beside_broken).all()
        else:
            assert torch.isfinite(healthy).all()
            assert torch.equal(healthy, beside_broken)
