"""Whatever cannot be served exactly is refused, and the refusal names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from storage.errors import AdapterRefusedError
from storage.formats.patterns import NumberPattern
from storage.formats.peft import read_peft

_Q = "base_model.model.model.layers.0.self_attn.q_proj"
_A, _B = f"{_Q}.lora_A.weight", f"{_Q}.lora_B.weight"
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def _files(
    config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> dict[str, bytes]:
    if tensors is None:
        tensors = {_A: torch.ones(2, 8), _B: torch.ones(6, 2)}
    return {
        "adapter_config.json": json.dumps(_CONFIG | (config or {})).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def _refusal(files: dict[str, bytes]) -> str:
    with pytest.raises(AdapterRefusedError) as refused:
        read_peft(files)
    return refused.value.message


def test_the_adapter_all_these_refusals_start_from_is_accepted() -> None:
    assert read_peft(_files()).rows.modules["model.layers.0.self_attn.q_proj"].add_gate == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", 1.5),
        ("lora_bias", "yes"),
        ("bias", "some"),
        ("bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"x": 1}),
        ("velora_config", {"scale": 1.0}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"x": 1}),
        ("ensure_weight_tying", True),
        ("some_setting_of_a_later_peft", 3),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("use_rslora", "no"),
        ("r", 0.5),
        ("r", "2"),
        ("r", None),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e9),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "2"}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", {"q_proj": 1e9}),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(setting: str, value: object) -> None:
    message = _refusal(_files({setting: value}))
    assert setting in message or "rank 2; expected" in message


@pytest.mark.parametrize("value", [None, False, "none", [], {}, ""])
def test_a_setting_that_is_switched_off_is_no_obstacle(value: object) -> None:
    read_peft(_files({"use_dora": value, "bias": "none", "layer_replication": value}))


@pytest.mark.parametrize(
    "peft_type", ["VERA", "TRAINABLE_TOKENS", "ADALORA", "LOHA", None, 3, ["LORA"], "lora"]
)
def test_another_family_is_refused_by_name(peft_type: object) -> None:
    assert f"{peft_type!r}" in _refusal(_files({"peft_type": peft_type}))


def _renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ours: ours | {f"{_Q}.lora_magnitude_vector": torch.ones(6)}, "magnitude_vector"),
        (lambda ours: ours | {f"{_Q}.base_layer.bias": torch.ones(6)}, "base_layer.bias"),
        (lambda ours: ours | {f"{_Q}.lora_B.bias": torch.ones(6)}, "lora_B.bias"),
        (lambda ours: ours | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "lm_head"),
        (_renamed("lora_", "lora_embedding_"), "lora_embedding_"),
        (_renamed(".weight", ".0.weight"), "lora_A.0.weight"),
        (_renamed("base_model.model.", ""), "model.layers.0.self_attn.q_proj.lora_A.weight"),
        (
            lambda ours: ours | {"base_model.model.lora_A.weight": torch.ones(2, 8)},
            "'base_model.model.lora_A",
        ),
        (_renamed("q_proj", "k_proj"), "k_proj.lora_A.weight' is for a module not in target_mod"),
        (lambda ours: {}, "no tensors"),
        (lambda ours: {_A: ours[_A]}, f"{_B}' is missing"),
        (lambda ours: {_B: ours[_B]}, f"{_A}' is missing"),
        (lambda ours: ours | {_B: torch.ones(6, 3)}, f"{_B}' has shape [6, 3]; expected 2 columns"),
        (lambda ours: ours | {_A: torch.ones(2, 8, 1)}, f"{_A}' has shape [2, 8, 1]; expected two"),
        (lambda ours: ours | {_A: torch.ones(2)}, f"{_A}' has shape [2]"),
        (lambda ours: {_A: torch.ones(0, 8), _B: torch.ones(6, 0)}, "[0, 8]"),
        (
            lambda ours: {_A: torch.ones(3, 8), _B: torch.ones(6, 3)},
            f"{_A}' has rank 3; expected 2",
        ),
        (lambda ours: ours | {_A: torch.ones(2, 8, dtype=torch.int32)}, f"{_A}' has dtype I32"),
        (
            lambda ours: ours | {_A: torch.ones(2, 8).to(torch.float8_e4m3fn)},
            f"{_A}' has dtype F8_E4M3",
        ),
        (lambda ours: ours | {_A: torch.full((2, 8), torch.nan)}, f"{_A}' has values that are not"),
        (
            lambda ours: ours | {_B: -torch.full((6, 2), torch.inf)},
            f"{_B}' has values that are not",
        ),
        (lambda ours: ours | {_B: -torch.full((6, 2), 1.1e4)}, f"{_B}' has the value 1.1e+04"),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    tensors = change({_A: torch.ones(2, 8), _B: torch.ones(6, 2)})
    assert told in _refusal(_files(tensors=tensors))


def test_a_value_at_the_limit_is_accepted() -> None:
    read_peft(_files(tensors={_A: torch.full((2, 8), 1e4), _B: -torch.full((6, 2), 1e4)}))


def test_an_excluded_module_is_refused() -> None:
    assert "exclude_modules" in _refusal(_files({"exclude_modules": ["self_attn.q_proj"]}))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(missing: str) -> None:
    files = _files()
    del files[missing]
    assert missing in _refusal(files)


def test_pickled_weights_are_refused_unread() -> None:
    files = _files()
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    assert "never read" in _refusal(files)
    assert "adapter_model.bin" in _refusal({**_files(), "adapter_model.bin": b""})


@pytest.mark.parametrize(
    "config", [b"", b"\xff", b"[]", b"{", b'{"peft_type": "LORA"', b"[" * 100_000, b"null"]
)
def test_settings_that_are_not_json_are_refused(config: bytes) -> None:
    assert "adapter_config.json" in _refusal({**_files(), "adapter_config.json": config})


@given(st.binary(max_size=200) | st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_no_damaged_tensor_file_does_more_than_be_refused(damage: bytes | int) -> None:
    whole = _files()["adapter_model.safetensors"]
    if isinstance(damage, int):  # one bit flipped, or cut off
        position = damage % len(whole)
        flipped = bytes([whole[position] ^ (1 << damage % 8)])
        for file in (whole[:position] + flipped + whole[position + 1 :], whole[:position]):
            with suppress(AdapterRefusedError):
                read_peft({**_files(), "adapter_model.safetensors": file})
    else:
        _refusal({**_files(), "adapter_model.safetensors": damage})


@pytest.mark.parametrize(
    "expression",
    ["(a+)+b", "(a|a)*b", "(a*){9}", "a*a*a*a*b", "a?" * 40 + "b", "x" * 300, "((a?)+)+"],
)
def test_an_expression_that_could_hang_us_is_refused_unmatched(expression: str) -> None:
    with pytest.raises(AdapterRefusedError, match="too long to match"):
        NumberPattern("rank_pattern", {expression: 2}, 4)


@given(
    path=st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join),
    patterns=st.dictionaries(
        st.sampled_from(
            ["a", "b", "a.b", r"a\.b", "^a", "^a.b", "b.*", ".*", "[ab]", "a|b", "(a)"]
        ),
        st.integers(1, 9),
        max_size=4,
    ),
)
def test_patterns_match_as_in_peft(path: str, patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    expected = patterns.get(get_pattern_key(list(patterns), path), 99)
    assert NumberPattern("rank_pattern", patterns, 99).of(path) == expected
