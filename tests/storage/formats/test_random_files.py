"""Whatever a stranger uploads, reading it gives finite rows that fit together, or one of our refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from storage.adapter_rows import AdapterRows
from storage.errors import AdapterRefusedError
from storage.formats.peft import READERS, read_peft

_Q = "base_model.model.model.layers.0.self_attn.q_proj"
_K = "base_model.model.model.layers.1.self_attn.k_proj"
_PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    *("base_layer.bias", "bias", "hira_A", "hira_B", "ia3_l", "lora_embedding_A", "weight", ""),
)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 12)
    | st.floats()
    | st.sampled_from(
        [
            "q_proj",
            "self_attn.k_proj",
            "layers",
            "all",
            "lora_only",
            "none",
            "all-linear",
            ".*",
            "(",
        ]
    )
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", ".*", "k", "(", "a" * 300]), inner, max_size=2)
    ),
    max_leaves=4,
)
_SETTINGS = sorted({name for reader in READERS.values() for name in reader.settings} | {"surprise"})
# Rank 2, 8 inputs and 6 outputs in every module: random tensors of these shapes often go together.
_SHAPES: dict[str, tuple[int, ...]] = {
    "lora_A.weight": (2, 8),
    "lora_B.weight": (6, 2),
    "hira_A": (2, 8),
    "hira_B": (6, 2),
    "ia3_l": (6, 1),
}


def _likely(peft_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """Settings that are mostly right, so that reading comes far."""
    usual = {
        "LORA": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]},
        "HIRA": {"r": 2, "target_modules": "all-linear"},
        "IA3": {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["mlp"]},
    }
    return {"peft_type": peft_type, **usual[peft_type], **config}


@st.composite
def _files(draw: st.DrawFn) -> dict[str, bytes]:
    peft_type = draw(st.sampled_from(sorted(READERS)))
    config = draw(st.dictionaries(st.sampled_from(_SETTINGS), _VALUES, max_size=2))
    if peft_type == "LORA":
        switches = st.sampled_from(["use_dora", "use_rslora", "lora_bias"])
        config |= draw(st.dictionaries(switches, st.booleans(), max_size=2))
        config |= draw(st.sampled_from([{}, {"bias": "all"}, {"bias": "lora_only"}]))
    own = {"LORA": _PARTS[:2], "HIRA": ("hira_A", "hira_B"), "IA3": ("ia3_l",)}[peft_type]
    names = [f"{path}.{part}" for path in (_Q, _K) for part in own]
    names += draw(st.lists(st.sampled_from([f"{_Q}.{part}" for part in _PARTS]), max_size=3))
    for missing in draw(st.lists(st.sampled_from(names), max_size=1)):
        names.remove(missing)
    tensors: dict[str, Tensor] = {}
    for name in names:
        usual = next((shape for part, shape in _SHAPES.items() if name.endswith(part)), (6,))
        shape = draw(st.sampled_from([usual] * 12 + [(8,), (1, 8), (6, 2), (2, 8, 1), (0,), ()]))
        tensors[name] = torch.full(shape, draw(st.sampled_from([0.5] * 9 + [float("nan"), 1e5])))
    return {
        "adapter_config.json": json.dumps(_likely(peft_type, config)).encode(),
        "adapter_model.safetensors": save(tensors),
    }


def _check(rows: AdapterRows) -> None:
    assert rows.modules
    for path, module in rows.modules.items():
        assert path.startswith("model.layers.")
        assert module.num_rows > 0
        for name, tensor in module.tensors().items():
            assert bool(torch.isfinite(tensor).all()), name
            assert tensor.ndim == (2 if name.startswith(("mul", "add")) else 1), name


@given(_files())
@settings(max_examples=500, deadline=None)
def test_a_random_adapter_is_read_or_refused(files: dict[str, bytes]) -> None:
    try:
        adapter = read_peft(files)
    except AdapterRefusedError as refused:
        assert refused.message
    else:
        _check(adapter.rows)
        for path, module in adapter.rows.modules.items():
            assert set(module.tensors()) <= set(adapter.tensor_names[path])


@pytest.mark.parametrize("peft_type", READERS)
def test_what_these_files_vary_is_accepted_as_it_is(peft_type: str) -> None:
    """So the test above does not only see refusals."""
    parts = {"LORA": _PARTS[:2], "HIRA": ("hira_A", "hira_B"), "IA3": ("ia3_l",)}[peft_type]
    tensors = {f"{_Q}.{part}": torch.full(_SHAPES[part], 0.5) for part in parts}
    files = {
        "adapter_config.json": json.dumps(_likely(peft_type, {})).encode(),
        "adapter_model.safetensors": save(tensors),
    }
    _check(read_peft(files).rows)
