"""What the door lets in is bound to its base; what it keeps out, it keeps out by name and unwritten."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import BaseFacts
from storage.errors import AdapterRefusedError, BaseMismatchError, UnknownModelError
from storage.formats.peft import read_peft
from storage.formats.tensors import read_tensors, write_tensors
from storage.formats.writing import write_flora, write_lora
from storage.local_store import LocalObjectStore
from storage.publishing import publish_adapter
from storage.registry import Registry
from tests.storage.peft_adapters import (
    BIAS_ALL,
    DORA,
    HIRA,
    IA3,
    IA3_EXPRESSION,
    LORA,
    RSLORA_PATTERNS,
    random_adapter,
    tiny_llama,
)
from tests.storage.versions import NAME

_Q, _UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
_BASE = BaseFacts("ab" * 32, "tiny", {_Q: (8, 6), _UP: (8, 10)})
_OTHER_BASE = replace(_BASE, digest="cd" * 32, name="other")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalObjectStore(tmp_path / "registry"))


def _flora(
    digest: str | None = _BASE.digest, path: str = _Q, num_in: int = 8, num_out: int = 6
) -> dict[str, bytes]:
    rows = ModuleRows(mul_b_RI=torch.ones(2, num_in), mul_a_RO=torch.ones(2, num_out))
    return write_flora(AdapterRows({path: rows}, digest), "tiny")


def _lora(digest: str | None = None) -> dict[str, bytes]:
    rows = {
        _Q: ModuleRows(add_p_EI=torch.ones(3, 8), add_q_EO=torch.ones(3, 6)),
        _UP: ModuleRows(
            add_p_EI=torch.ones(1, 8).to(torch.bfloat16),
            add_q_EO=torch.ones(1, 10).to(torch.bfloat16),
        ),
    }
    return write_lora(AdapterRows(rows, digest), "tiny")


def test_a_push_describes_what_it_published(registry: Registry) -> None:
    manifest = publish_adapter(
        registry, NAME, _lora(), _BASE, alias="prod", source="training:7", clock=lambda: 12.5
    )
    assert registry.resolve(NAME, "prod") == manifest.version
    assert registry.manifest(NAME, manifest.version) == manifest
    with pytest.raises(UnknownModelError):
        registry.resolve(NAME, "latest")
    content, provenance = manifest.content, manifest.provenance
    assert (content.family, content.ranks) == ("lora", {_Q: 3, _UP: 1})
    assert (content.dtype, content.max_rank) == ("bfloat16,float32", 3)
    assert content.base_digest == _BASE.digest
    assert (provenance.created_s, provenance.source) == (12.5, "training:7")
    assert (provenance.base_name, provenance.warnings) == ("tiny", ())


def test_published_files_are_the_ones_pushed(registry: Registry) -> None:
    files = _flora()
    content = publish_adapter(registry, NAME, files, _BASE).content
    assert {path: registry.read_file(entry) for path, entry in content.files.items()} == files


def test_pushing_the_same_again_later_is_the_same_version(registry: Registry) -> None:
    clock = itertools.count(1.0).__next__
    first = publish_adapter(registry, NAME, _flora(), _BASE, clock=clock)
    second = publish_adapter(registry, NAME, _flora(), _BASE, clock=clock, source="import")
    assert first.version == second.version
    assert registry.versions(NAME) == [first]


def test_an_adapter_that_multiplies_another_bases_weights_is_refused(registry: Registry) -> None:
    with pytest.raises(BaseMismatchError) as refused:
        publish_adapter(registry, NAME, _flora(_OTHER_BASE.digest), _BASE)
    assert _OTHER_BASE.digest[:12] in refused.value.message and "tiny" in refused.value.message
    assert list(registry.list()) == []


def test_a_lora_made_for_another_base_of_the_same_shapes_is_published_with_a_warning(
    registry: Registry,
) -> None:
    manifest = publish_adapter(registry, NAME, _lora(_OTHER_BASE.digest), _BASE)
    (warning,) = manifest.provenance.warnings
    assert "another base model" in warning


def test_a_base_whose_layers_only_the_engine_knows_is_a_warning(registry: Registry) -> None:
    base = replace(_BASE, are_layers_known=False)
    (warning,) = publish_adapter(registry, NAME, _flora(), base).provenance.warnings
    assert "shows when it is first used" in warning


def _tiny_facts() -> BaseFacts:
    """The tiny Llama that `random_adapter` adapts."""
    projections = {
        path: (module.in_features, module.out_features)
        for path, module in tiny_llama().named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    return BaseFacts("ef" * 32, "tiny", projections)


@pytest.mark.parametrize(
    ("config", "family", "is_bound"),
    [
        (HIRA, "hira", True),
        (DORA, "dora", True),
        (LORA, "lora", False),
        (RSLORA_PATTERNS, "rslora", False),
        (BIAS_ALL, "lora", False),
        (IA3, "ia3", False),
    ],
)
def test_a_peft_directory_is_bound_to_the_base_it_is_pushed_for(
    registry: Registry, tmp_path: Path, config: PeftConfig, family: str, is_bound: bool
) -> None:
    """The warning is for families that multiply or measure the base's weights."""
    _, files = random_adapter(config, tmp_path / "peft", torch.bfloat16)
    base = _tiny_facts()
    manifest = publish_adapter(registry, NAME, files, base)
    content = manifest.content
    assert (content.family, content.base_digest) == (family, base.digest)
    assert content.dtype == "bfloat16"
    assert content.max_rank == max(read_peft(files).rows.max_rank, 1)
    for warning in manifest.provenance.warnings:
        assert "do not say which base" in warning and "bound to tiny" in warning
    assert len(manifest.provenance.warnings) == is_bound
    # For another base the same files are another version.
    other = publish_adapter(registry, NAME, files, replace(base, digest="12" * 32))
    assert other.version != manifest.version


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        (DORA, (20, 24), "q_proj.lora_A.weight' is for 32 input features; expected 20"),
        (DORA, (32, 20), "q_proj.lora_B.weight' is for 24 output features; expected 20"),
        (BIAS_ALL, None, "q_proj.lora_A.weight' is for 'model.layers.0.self_attn.q_proj', which"),
        (IA3_EXPRESSION, (32, 20), "q_proj.ia3_l' is for 24 output features; expected 20"),
    ],
)
def test_an_adapter_of_any_family_that_does_not_fit_is_refused_by_tensor(
    registry: Registry,
    tmp_path: Path,
    config: PeftConfig,
    change: tuple[int, int] | None,
    told: str,
) -> None:
    _, files = random_adapter(config, tmp_path / "peft", torch.float32)
    base = _tiny_facts()
    del base.projections[_Q]
    if change is not None:
        base.projections[_Q] = change
    with pytest.raises(AdapterRefusedError) as refused:
        publish_adapter(registry, NAME, files, base)
    assert told in refused.value.message
    assert list(registry.list()) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (_flora(path="model.layers.7.mlp.up_proj"), "'model.layers.7.mlp.up_proj', which is not"),
        (_flora(path="lm_head"), "'lm_head', which is not"),
        (_flora(path="transformer.wte"), "can be adapted (embeddings, norms and the output head"),
        (_flora(num_in=9), f"{_Q}.hira_A' is for 9 input features; expected 8"),
        (_flora(num_out=7), f"{_Q}.hira_B' is for 7 output features; expected 6"),
        (_flora(path=_UP), f"{_UP}.hira_B' is for 6 output features; expected 10"),
        ({}, "adapter_config.json is missing"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_tensor_and_leaves_no_trace(
    registry: Registry, tmp_path: Path, files: dict[str, bytes], told: str
) -> None:
    with pytest.raises(AdapterRefusedError) as refused:
        publish_adapter(registry, NAME, files, _BASE)
    assert told in refused.value.message
    assert list(LocalObjectStore(tmp_path / "registry").list("")) == []


def test_a_value_that_would_reach_other_tenants_is_refused(registry: Registry) -> None:
    for value in (float("nan"), 3e38):
        rows = ModuleRows(mul_b_RI=torch.full((1, 8), value), mul_a_RO=torch.ones(1, 6))
        with pytest.raises(AdapterRefusedError, match="hira_A"):
            publish_adapter(registry, NAME, write_flora(AdapterRows({_Q: rows}), "tiny"), _BASE)
    assert list(registry.list()) == []


def test_an_adapter_over_the_byte_limit_is_refused_unread(registry: Registry) -> None:
    files = {"adapter_model.safetensors": b"not even a tensor file"}
    with pytest.raises(AdapterRefusedError, match="has 22 bytes; at most 21"):
        publish_adapter(registry, NAME, files, _BASE, max_bytes=21)


def test_what_training_writes_is_read_back_bound_to_its_base(registry: Registry) -> None:
    files = _flora()
    assert read_peft(files).rows.base_digest == _BASE.digest
    assert publish_adapter(registry, NAME, files, _BASE).provenance.warnings == ()


def test_a_trained_bias_of_a_norm_is_refused_by_name(registry: Registry, tmp_path: Path) -> None:
    """`bias="all"` trains the norms' biases too, where the model has any (GPT-2); no row stands for them."""
    _, files = random_adapter(BIAS_ALL, tmp_path / "peft", torch.float32)
    name = "adapter_model.safetensors"
    tensors, metadata = read_tensors(name, files[name])
    tensors["base_model.model.model.norm.bias"] = torch.ones(32)
    with pytest.raises(AdapterRefusedError, match=r"'base_model\.model\.model\.norm\.bias' is for"):
        publish_adapter(
            registry, NAME, {**files, name: write_tensors(tensors, metadata)}, _tiny_facts()
        )
