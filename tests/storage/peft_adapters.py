"""Adapters made by the real PEFT on a tiny random Llama, every tensor random: a fresh adapter would change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from storage.adapter_directory import read_directory, write_directory
from storage.adapter_rows import ModuleRows
from workers.row_form.reference import reference_product

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LORA = LoraConfig(r=4, lora_alpha=7, target_modules=ALL_LINEAR)
RSLORA_PATTERNS = LoraConfig(
    r=4,
    lora_alpha=7,
    use_rslora=True,
    target_modules=ALL_LINEAR,
    # Two keys fit some modules: the first one counts, in PEFT and here.
    rank_pattern={"layers.1.self_attn.q_proj": 3, "q_proj": 2, r".*\.0\.mlp\.down_proj": 5},
    alpha_pattern={r"^model\.layers\.0\..*": 11, "q_proj": 0.5, "mlp.up_proj": 2},
)
HIRA = HiraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"])
HIRA_PATTERN = HiraConfig(r=3, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "up_proj"])
DORA = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=ALL_LINEAR)
DORA_PATTERNS = LoraConfig(
    r=4,
    lora_alpha=7,
    use_dora=True,
    use_rslora=True,
    target_modules=["q_proj", "down_proj"],
    rank_pattern={"q_proj": 1},
    alpha_pattern={"layers.1.mlp.down_proj": 2},
)
IA3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
IA3_EXPRESSION = IA3Config(
    target_modules=r".*\.(q_proj|o_proj|up_proj)", feedforward_modules=r".*\.up_proj"
)
LORA_BIAS = LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=["q_proj", "o_proj"])
BIAS_LORA_ONLY = LoraConfig(r=2, bias="lora_only", target_modules=["v_proj", "up_proj"])
BIAS_ALL = LoraConfig(r=2, bias="all", lora_bias=True, target_modules=["q_proj", "k_proj"])
DORA_BIAS = LoraConfig(r=2, bias="all", use_dora=True, target_modules=["v_proj", "gate_proj"])


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, all widths different, so that a swapped side or module cannot go unnoticed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=True,
        initializer_range=0.3,
    )
    return _with_random_biases(LlamaForCausalLM(config)).to(dtype).eval()


def tiny_qwen2(dtype: torch.dtype = torch.float64, seed: int = 0) -> Qwen2ForCausalLM:
    """As the tiny Llama, with biases on q, k and v only."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return _with_random_biases(Qwen2ForCausalLM(config)).to(dtype).eval()


Model = TypeVar("Model", bound=nn.Module)


def _with_random_biases(model: Model) -> Model:
    """transformers begins with zeros, under which a bias taken wrongly would go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model


def random_adapter(
    config: PeftConfig,
    directory: Path,
    dtype: torch.dtype = torch.float64,
    base: Callable[[torch.dtype], PreTrainedModel] = tiny_llama,
) -> tuple[PeftModel, dict[str, bytes]]:
    """A PEFT model in which all that is trained is random, and the files that PEFT saved it as."""
    model = get_peft_model(base(dtype), copy.deepcopy(config), autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model, read_directory(directory)


def loaded(files: dict[str, bytes], directory: Path) -> PeftModel:
    """A PEFT model of these files on the tiny Llama. Fails if PEFT misses or does not know a tensor."""
    write_directory(directory, files)
    model = PeftModel.from_pretrained(tiny_llama(), directory, autocast_adapter_dtype=False)
    missed = model.load_adapter(directory, "again", autocast_adapter_dtype=False)
    assert not missed.unexpected_keys
    assert not [key for key in missed.missing_keys if "lora_" in key or "hira_" in key]
    return model.eval()


def merged_weights(model: PeftModel) -> dict[str, Tensor]:
    """Every linear layer's weight with PEFT's adapter in it, by module path in the base model."""
    merged: nn.Module = model.merge_and_unload()
    return linear_weights(merged)


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weight and, as one more column, bias of every linear layer."""
    return {
        path: _with_bias(module.weight.detach(), module.bias)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def adapted_weight(weight: Tensor, rows: ModuleRows) -> Tensor:
    """The weight, with the bias as its last column, that these rows stand for, in float64."""
    weight_OI, bias_O = weight[:, :-1], weight[:, -1]
    nothing = torch.zeros(1, weight_OI.shape[1])
    adapted_bias_O = reference_product(nothing, weight_OI, bias_O, rows)[0]
    adapted_IO = reference_product(torch.eye(weight_OI.shape[1]), weight_OI, bias_O, rows)
    return _with_bias((adapted_IO - adapted_bias_O).T, adapted_bias_O)


def _with_bias(weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if bias_O is None:
        bias_O = weight_OI.new_zeros(weight_OI.shape[0])
    return torch.cat([weight_OI, bias_O.detach()[:, None]], dim=1)


def relative_error(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """The error relative to what the adapter itself changes."""
    return float((found - expected).norm() / (expected - base).norm())


def targeted(config: Any, paths: Iterable[str]) -> set[str]:
    return {path for path in paths if path.rpartition(".")[2] in config.target_modules}
