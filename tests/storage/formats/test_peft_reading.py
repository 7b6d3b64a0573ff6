"""Adapters written by PEFT mean here what they mean in PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftConfig

from storage.adapter_directory import read_directory
from storage.formats.peft import read_peft
from tests.storage.peft_adapters import (
    BIAS_ALL,
    BIAS_LORA_ONLY,
    DORA,
    DORA_BIAS,
    DORA_PATTERNS,
    HIRA,
    HIRA_PATTERN,
    IA3,
    IA3_EXPRESSION,
    LORA,
    LORA_BIAS,
    RSLORA_PATTERNS,
    adapted_weight,
    linear_weights,
    merged_weights,
    random_adapter,
    relative_error,
    targeted,
    tiny_llama,
)

_CASES = [
    pytest.param(LORA, "lora", id="lora"),
    pytest.param(RSLORA_PATTERNS, "rslora", id="rslora-patterns"),
    pytest.param(DORA, "dora", id="dora"),
    pytest.param(DORA_PATTERNS, "dora", id="dora-rslora-patterns"),
    pytest.param(DORA_BIAS, "dora", id="dora-bias-all"),
    pytest.param(IA3, "ia3", id="ia3"),
    pytest.param(IA3_EXPRESSION, "ia3", id="ia3-expressions"),
    pytest.param(LORA_BIAS, "lora", id="lora-bias"),
    pytest.param(BIAS_LORA_ONLY, "lora", id="bias-lora-only"),
    pytest.param(BIAS_ALL, "lora", id="bias-all-lora-bias"),
    pytest.param(HIRA, "hira", id="hira"),
    pytest.param(HIRA_PATTERN, "hira", id="hira-rank-pattern"),
    pytest.param(
        LoraConfig(r=2, target_modules=r".*\.1\.mlp\..*_proj", exclude_modules=["up_proj"]),
        "lora",
        id="lora-target-expression",
    ),
    pytest.param(
        HiraConfig(r=2, target_modules="all-linear", layers_to_transform=None), "hira", id="all"
    ),
    pytest.param(
        LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*\.0\..*"),
        "lora",
        id="lora-all-but",
    ),
    pytest.param(
        LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1]),
        "lora",
        id="lora-layers",
    ),
    pytest.param(
        HiraConfig(r=2, target_modules=["k_proj"], layers_to_transform=0, layers_pattern="layers"),
        "hira",
        id="hira-layers-pattern",
    ),
    pytest.param(
        LoraConfig(r=2, target_modules=["o_proj"], fan_in_fan_out=True), "lora", id="fan-in"
    ),
]


@pytest.mark.parametrize(("config", "family"), _CASES)
def test_rows_stand_for_the_weights_peft_merges(
    config: PeftConfig, family: str, tmp_path: Path
) -> None:
    model, files = random_adapter(config, tmp_path)
    adapter = read_peft(files)
    assert adapter.family == family
    base = linear_weights(tiny_llama())
    expected = merged_weights(model)
    touched = {path for path in base if not torch.equal(base[path], expected[path])}
    assert set(adapter.rows.modules) == touched != set()
    for path, rows in adapter.rows.modules.items():
        found = adapted_weight(base[path], rows)
        assert relative_error(found, expected[path], base[path]) < 1e-12


@pytest.mark.parametrize(("config", "family"), _CASES)
def test_a_neighbours_rows_would_be_noticed(
    config: PeftConfig, family: str, tmp_path: Path
) -> None:
    """The twin of the test above: the comparison fails for the same layer one block further, and for no adapter."""
    model, files = random_adapter(config, tmp_path)
    base, expected = linear_weights(tiny_llama()), merged_weights(model)
    modules = read_peft(files).rows.modules
    for path in modules:
        neighbour = path.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")
        if neighbour in modules:
            found = adapted_weight(base[path], modules[neighbour])
            assert relative_error(found, expected[path], base[path]) > 0.5
        assert relative_error(base[path], expected[path], base[path]) > 0.5


def test_patterns_give_each_module_its_own_rank_and_scale(tmp_path: Path) -> None:
    _, files = random_adapter(RSLORA_PATTERNS, tmp_path)
    modules = read_peft(files).rows.modules
    ranks = {path.removeprefix("model.layers."): rows.num_add for path, rows in modules.items()}
    assert ranks["0.self_attn.q_proj"] == 2
    assert ranks["1.self_attn.q_proj"] == 3
    assert ranks["0.mlp.down_proj"] == 5
    assert ranks["1.mlp.down_proj"] == 4
    gates = {path.removeprefix("model.layers."): rows.add_gate for path, rows in modules.items()}
    assert gates["0.self_attn.q_proj"] == 11 / 2**0.5
    assert gates["1.self_attn.q_proj"] == 0.5 / 3**0.5
    assert gates["1.mlp.up_proj"] == 2 / 4**0.5
    assert gates["1.mlp.down_proj"] == 7 / 4**0.5


@pytest.mark.parametrize("config", [LORA, HIRA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_keep_the_dtype_and_the_bits_of_the_file(
    config: PeftConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, files = random_adapter(config, tmp_path, dtype)
    adapter = read_peft(files)
    state = model.state_dict()
    assert set(adapter.rows.modules) == targeted(config, linear_weights(tiny_llama()))
    for path, rows in adapter.rows.modules.items():
        in_name, out_name = (
            name.replace("_A", "_A.default").replace("_B", "_B.default")
            for name in adapter.tensor_names[path].values()
        )
        found_in, found_out = (
            (rows.mul_b_RI, rows.mul_a_RO) if config is HIRA else (rows.add_p_EI, rows.add_q_EO)
        )
        assert found_in is not None and found_out is not None
        assert found_in.dtype == found_out.dtype == dtype
        assert torch.equal(found_in, state[in_name])
        assert torch.equal(found_out, state[out_name].T)
        assert found_out.is_contiguous()


def test_what_lies_beside_the_adapter_is_not_read(tmp_path: Path) -> None:
    _, files = random_adapter(LORA, tmp_path)
    assert (tmp_path / "README.md").exists()
    (tmp_path / "optimizer.pt").write_bytes(b"pickled")
    assert read_directory(tmp_path) == files
