"""LoRA's variants, IA3 and layer choices: settings and tensors that contradict each other are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save
from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.formats.peft import read_peft
from storage.formats.targets import Targets
from tests.storage.peft_adapters import random_adapter

_Q, _K = (f"base_model.model.model.layers.0.self_attn.{name}_proj" for name in "qk")
_A, _B, _M = f"{_Q}.lora_A.weight", f"{_Q}.lora_B.weight", f"{_Q}.lora_magnitude_vector"
_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
_IA3 = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}

Tensors = dict[str, Tensor]


def _files(config: dict[str, Any], tensors: Tensors) -> dict[str, bytes]:
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def _lora(changes: dict[str, Any], more: Tensors) -> dict[str, bytes]:
    return _files(_LORA | changes, {_A: torch.ones(2, 8), _B: torch.ones(6, 2), **more})


def _ia3(changes: dict[str, Any], shape: tuple[int, ...]) -> dict[str, bytes]:
    return _files(_IA3 | changes, {f"{_Q}.ia3_l": torch.ones(shape)})


def _refusal(files: dict[str, bytes]) -> str:
    with pytest.raises(AdapterRefusedError) as refused:
        read_peft(files)
    return refused.value.message


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        ({"use_dora": True}, {}, f"{_M}' is missing"),
        ({}, {_M: torch.ones(6)}, f"{_M}': the setting use_dora is off"),
        ({"use_dora": True}, {_M: torch.ones(1, 6)}, f"{_M}' has shape [1, 6]; expected one dim"),
        ({"lora_bias": True}, {}, f"{_Q}.lora_B.bias' is missing"),
        ({}, {f"{_Q}.lora_B.bias": torch.ones(6)}, "lora_B.bias': the setting lora_bias is off"),
        (
            {"bias": "all"},
            {f"{_Q}.lora_B.bias": torch.ones(6)},
            "lora_B.bias': the setting lora_bias is off",
        ),
        ({"lora_bias": True, "use_dora": True}, {}, "use_dora and lora_bias exclude each other"),
        ({}, {f"{_Q}.base_layer.bias": torch.ones(6)}, "base_layer.bias': the setting bias=none"),
        ({}, {f"{_K}.bias": torch.ones(6)}, "k_proj.bias': the setting bias=none"),
        ({"bias": "lora_only"}, {f"{_K}.bias": torch.ones(6)}, "k_proj.bias': the setting bias=lo"),
        ({"bias": "lora_only"}, {f"{_Q}.bias": torch.ones(6)}, "q_proj.bias': the setting bias=lo"),
        ({"bias": "all"}, {f"{_Q}.bias": torch.ones(6)}, "q_proj.bias': the setting bias=all"),
        (
            {"bias": "all"},
            {f"{_K}.base_layer.bias": torch.ones(6)},
            "k_proj.base_layer.bias': the setting bias=all saves it for no module without LoRA",
        ),
        ({"bias": "all"}, {f"{_K}.bias": torch.ones(6, 1)}, "k_proj.bias' has shape [6, 1]"),
        (
            {"bias": "all", "lora_bias": True},
            {f"{_Q}.base_layer.bias": torch.ones(6), f"{_Q}.lora_B.bias": torch.ones(5)},
            "have 6 and 5 values",
        ),
        ({}, {f"{_Q}.base_layer.weight": torch.ones(6, 8)}, "base_layer.weight"),
        ({}, {"base_model.model.lm_head.modules_to_save.weight": torch.ones(2, 2)}, "modules_to_s"),
        ({}, {f"{_Q}.token_adapter.trainable_tokens_delta": torch.ones(2, 2)}, "trained tokens"),
        ({}, {f"{_Q}.lora_embedding_A": torch.ones(2, 2)}, "on embeddings are not supported"),
        ({"layers_to_transform": [1, 3]}, {}, f"{_A}' is for a module in a layer that is not in"),
        ({"layers_to_transform": 1}, {}, "layers_to_transform"),
        ({"layers_to_transform": "1"}, {}, "layers_to_transform is neither"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, {}, "layers_to_transform"),
    ],
)
def test_a_lora_whose_settings_and_tensors_disagree_is_refused_by_name(
    changes: dict[str, Any], more: Tensors, told: str
) -> None:
    assert told in _refusal(_lora(changes, more))


@pytest.mark.parametrize(
    ("changes", "shape", "told"),
    [
        ({}, (1, 8), "ia3_l' has shape [1, 8]; expected [out, 1], as the setting feedforward"),
        ({"feedforward_modules": ["q_proj"]}, (6, 1), "expected [1, in], as the setting feed"),
        ({"feedforward_modules": ".*mlp"}, (1, 1), "expected [1, in] or [out, 1], and which"),
        ({"feedforward_modules": ".*mlp"}, (2, 3), "expected [1, in] or [out, 1]"),
        ({}, (6,), "ia3_l' has shape [6]; expected two dimensions"),
        ({"target_modules": ["k_proj"]}, (6, 1), "not in target_modules"),
        ({"modules_to_save": ["lm_head"]}, (6, 1), "modules_to_save"),
        ({"layers_to_transform": [0]}, (6, 1), "layers_to_transform=[0] is not supported for IA3"),
        ({"bias": "all"}, (6, 1), 'bias="all" is not supported for IA3'),
    ],
)
def test_an_ia3_whose_settings_and_tensor_disagree_is_refused_by_name(
    changes: dict[str, Any], shape: tuple[int, ...], told: str
) -> None:
    assert told in _refusal(_ia3(changes, shape))


def test_an_ia3_vector_of_one_feature_goes_by_the_list() -> None:
    path = "model.layers.0.self_attn.q_proj"
    assert read_peft(_ia3({}, (1, 1))).rows.modules[path].scale_O is not None
    inputs = read_peft(_ia3({"feedforward_modules": ["q_proj"]}, (1, 1)))
    assert inputs.rows.modules[path].num_mul == 1


def test_16_bit_vectors_near_one_lose_nothing() -> None:
    """1.0078125 is the first bfloat16 above 1; what was learnt is the difference, and it stays exact."""
    vector = torch.full((1, 8), 1.0078125, dtype=torch.bfloat16)
    files = _files(_IA3 | {"feedforward_modules": ["q_proj"]}, {f"{_Q}.ia3_l": vector})
    (rows,) = read_peft(files).rows.modules.values()
    assert rows.mul_b_RI is not None
    assert torch.equal(rows.mul_b_RI, torch.full((1, 8), 0.0078125))


# By what the refusal names.
_UNSUPPORTED: dict[str, Callable[[], PeftConfig]] = {
    "'base_model.model.model.embed_tokens.base_layer.weight': adapters on embeddings": lambda: (
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    ),
    "'base_model.model.lm_head.base_layer.weight': adapters on embeddings or the output": lambda: (
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    ),
    "modules_to_save": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "embed_tokens": lambda: HiraConfig(r=2, target_modules=["embed_tokens"]),
    "trainable_token_indices": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]
    ),
    "layer_replication": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]
    ),
    "alora_invocation_tokens": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
    ),
    "target_parameters": lambda: LoraConfig(
        r=2, target_modules=[], target_parameters=["q_proj.weight"]
    ),
    "init_lora_weights": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights="olora"
    ),
    "modules_to_save=": lambda: IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["embed_tokens"]
    ),
}


@pytest.mark.parametrize("told", _UNSUPPORTED)
def test_what_peft_itself_saves_and_we_cannot_serve_is_refused_by_name(
    told: str, tmp_path: Path
) -> None:
    _, files = random_adapter(_UNSUPPORTED[told](), tmp_path, torch.float32)
    assert told in _refusal(files)


@given(
    path=st.sampled_from(
        [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.experts.0.up_proj",
            "transformer.h.11.attn.q_proj",
            "q_proj",
            "lm_head",
        ]
    ),
    targets=st.lists(
        st.sampled_from(
            ["q_proj", "up_proj", "proj", "attn.q_proj", "model.layers.0.self_attn.q_proj"]
        ),
        min_size=1,
    ),
    excluded=st.none() | st.lists(st.sampled_from(["q_proj", "mlp.up_proj"]), min_size=1),
    layers=st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 11])),
    pattern=st.none() | st.just("h") | st.lists(st.sampled_from(["layers", "h", "experts"])),
)
@settings(max_examples=300, deadline=None)
def test_a_module_is_targeted_here_when_it_is_in_peft(
    path: str, targets: list[str], excluded: Any, layers: Any, pattern: Any
) -> None:
    if layers is None:
        pattern = None
    chosen = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    is_targeted = check_target_module_exists(LoraConfig(r=2, **chosen), path) is True
    if is_targeted:
        Targets(chosen).check(path, "t")
    else:
        with pytest.raises(AdapterRefusedError, match="'t'"):
            Targets(chosen).check(path, "t")
