"""Adapters made by the real PEFT on a tiny random Llama, every tensor random: a fresh adapter would change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from storage.adapter_directory import read_directory, write_directory
from storage.adapter_rows import ModuleRows

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
    return LlamaForCausalLM(config).to(dtype).eval()


def random_adapter(
    config: PeftConfig, directory: Path, dtype: torch.dtype = torch.float64
) -> tuple[PeftModel, dict[str, bytes]]:
    """A PEFT model with random adapter tensors, and the files that PEFT saved it as."""
    model = get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hira_" in name:
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
    return {
        path: module.weight.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def adapted_weight(weight_OI: Tensor, rows: ModuleRows) -> Tensor:
    """The weight these rows stand for, in float64."""
    factor_OI = torch.full_like(weight_OI, float(rows.offset))
    if rows.num_mul:
        assert rows.mul_a_RO is not None and rows.mul_b_RI is not None
        factor_OI += rows.mul_a_RO.double().T @ rows.mul_b_RI.double()
    adapted_OI = weight_OI * factor_OI
    if rows.num_add:
        assert rows.add_q_EO is not None and rows.add_p_EI is not None
        adapted_OI = adapted_OI + rows.add_gate * rows.add_q_EO.double().T @ rows.add_p_EI.double()
    return adapted_OI


def relative_error(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """The error relative to what the adapter itself changes."""
    return float((found - expected).norm() / (expected - base).norm())


def targeted(config: Any, paths: Iterable[str]) -> set[str]:
    return {path for path in paths if path.rpartition(".")[2] in config.target_modules}
