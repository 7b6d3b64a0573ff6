"""A tiny random model of every family that is served, saved as its makers would, and adapters of PEFT's over it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from storage.adapter_directory import read_directory
from storage.adapter_rows import AdapterRows
from storage.formats.peft import read_peft
from workers.models.wrapping import linear_layers
from workers.row_form.reference import reference_product

VOCABULARY = 90
MAX_TOKENS = 48
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}
_WIDE_WINDOW = {"sliding_window": MAX_TOKENS}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {**_GATED, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_GATED, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GATED, **_WIDE_WINDOW}),
    "qwen2": ("qwen2", {"intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GATED),
    "gemma": ("gemma", {**_GATED, "num_key_value_heads": 1}),
    # Untied: with their embeddings' scale, tied ones of a random model answer with the prompt's last token forever.
    "gemma2": (
        "gemma2",
        {
            **_GATED,
            **_WIDE_WINDOW,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 6,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**_GATED, **_WIDE_WINDOW, "query_pre_attn_scalar": 6, "tie_word_embeddings": False},
    ),
    "phi": ("phi", {"intermediate_size": 40, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"intermediate_size": 40, "num_key_value_heads": 2}),
    "phi3-longrope": (
        "phi3",
        {
            "intermediate_size": 40,
            "original_max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [3.0, 4.0, 5.0, 6.0],
            },
        },
    ),
    "gpt2": ("gpt2", {"n_inner": 40}),
    "gpt2-scaled": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 40, "multi_query": True}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False, "tie_word_embeddings": False}),
    "starcoder2": (
        "starcoder2",
        {"intermediate_size": 40, "num_key_value_heads": 2, **_WIDE_WINDOW},
    ),
    "pythia": ("gpt_neox", {"intermediate_size": 40, "rotary_pct": 0.25}),
    "pythia-serial": ("gpt_neox", {"intermediate_size": 40, "use_parallel_residual": False}),
    "opt": ("opt", {"ffn_dim": 40}),
    "opt-projected": (
        "opt",
        {"ffn_dim": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
}


def save_family(name: str, directory: Path, *, bare: bool = False) -> Path:
    """Every parameter random, biases and norms too, so that none can be left out unnoticed.

    A bare checkpoint is of the decoder only, without its name and without a head.
    """
    model_type, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    (model.base_model if bare else model).save_pretrained(directory)
    return directory


def loaded(directory: Path) -> PreTrainedModel:
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()


def peft_adapter(
    config: PeftConfig, directory: Path, scratch: Path, seed: int
) -> tuple[PeftModel, AdapterRows]:
    """All that is trained is random."""
    model = get_peft_model(loaded(directory), copy.copy(config), autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # What multiplies every output must not make all of them small.
                size = 1.5 if "ia3" in name or "magnitude" in name else 0.5
                parameter.copy_(size * torch.randn_like(parameter))
    model.save_pretrained(scratch)
    return model.eval(), read_peft(read_directory(scratch)).rows


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) features of every layer that adapters may name."""
    return {
        path: (layer.in_features, layer.out_features)
        if isinstance(layer, torch.nn.Linear)
        else (layer.nx, layer.nf)
        for path, layer in linear_layers(model).items()
    }


def with_weights_of(rows: AdapterRows, directory: Path) -> PreTrainedModel:
    """The model whose own weights are those the adapter (of mul and add rows) stands for, by the definition."""
    model = loaded(directory)
    layers = linear_layers(model)
    with torch.no_grad():
        for path, module_rows in rows.modules.items():
            layer = layers[path]
            weight_OI = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
            one_II = torch.eye(weight_OI.shape[1])
            weight_OI.copy_(reference_product(one_II, weight_OI, None, module_rows).T)
    return model


_EVERYWHERE = {"target_modules": "all-linear"}
PEFT_KINDS: Mapping[str, PeftConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=2, **_EVERYWHERE),
    "hira": HiraConfig(r=3, **_EVERYWHERE),
    "dora": LoraConfig(r=2, lora_alpha=2, use_dora=True, bias="lora_only", **_EVERYWHERE),
    "ia3": IA3Config(feedforward_modules=r".*(mlp|fc)\d?\..*|.*fc\d", **_EVERYWHERE),
}
"""On every layer that PEFT calls linear."""
