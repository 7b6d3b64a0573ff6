"""A base model's identity is its tensors: not its files, not the order of anything, but every bit and the dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage.base_checkpoint import read_base_facts
from storage.errors import InvalidRequestError
from tests.storage.peft_adapters import tiny_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llama(torch.float32).save_pretrained(directory)
    return directory


def _saved(tensors: dict[str, Tensor], directory: Path) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def _sharded(tensors: dict[str, Tensor], directory: Path, num_shards: int) -> Path:
    directory.mkdir()
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, directory / file, metadata={"shard": str(shard)})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_projections_are_the_linear_layers_of_the_model_but_its_head(checkpoint: Path) -> None:
    facts = read_base_facts(checkpoint)
    expected = {
        path: (module.in_features, module.out_features)
        for path, module in tiny_llama().named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    assert facts.projections == expected
    assert len(expected) == 14
    assert facts.name == "tiny"
    assert read_base_facts(checkpoint, "org/tiny").name == "org/tiny"


def test_a_projections_path_is_the_modules_path_in_the_model(checkpoint: Path) -> None:
    model = tiny_llama()
    for path, (num_in, num_out) in read_base_facts(checkpoint).projections.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        assert (module.in_features, module.out_features) == (num_in, num_out)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_the_digest_does_not_depend_on_the_sharding(
    checkpoint: Path, tmp_path: Path, num_shards: int
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    backwards = dict(reversed(tensors.items()))
    sharded = _sharded(backwards, tmp_path / "tiny", num_shards)
    shutil.copy(checkpoint / "config.json", sharded)
    assert read_base_facts(sharded) == read_base_facts(checkpoint)


def test_the_digest_depends_on_every_name_shape_dtype_and_bit(
    checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    flipped = tensors[name].clone()
    flipped.view(torch.int32)[-1, -1] ^= 1
    changes = {
        "bit": tensors | {name: flipped},
        "dtype": tensors | {name: tensors[name].view(torch.int32)},
        "shape": tensors | {name: tensors[name].reshape(tensors[name].shape[::-1])},
        "name": {key.replace("up_proj", "other"): tensor for key, tensor in tensors.items()},
        "missing": {key: tensor for key, tensor in tensors.items() if key != name},
        "bfloat16": {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()},
    }
    digests = {read_base_facts(checkpoint).digest}
    for change, changed in changes.items():
        digests.add(read_base_facts(_saved(changed, tmp_path / change)).digest)
    assert len(digests) == 1 + len(changes)


def test_the_digest_is_the_one_that_published_adapters_are_bound_to(tmp_path: Path) -> None:
    """A change of this value would refuse every adapter published before."""
    directory = _saved(
        {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)},
        tmp_path / "fixed",
    )
    facts = read_base_facts(directory)
    assert facts.digest == "0a438b7921f77c12afaff7f2363b9c1260b4e9021c8178f8197e62f7e95d2cb8"
    assert facts.projections == {"a": (3, 2)}


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    good = {"a.weight": torch.ones(2, 3)}
    index = "model.safetensors.index.json"

    def damaged(name: str, file: str, data: bytes) -> Path:
        directory = _saved(good, tmp_path / name)
        (directory / file).write_bytes(data)
        return directory

    whole = (_saved(good, tmp_path / "good") / "model.safetensors").read_bytes()
    twice = _sharded(good, tmp_path / "twice", 1)
    save_file(good, twice / "again.safetensors")
    (twice / index).write_text(
        json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "again.safetensors"}})
    )
    outside = json.dumps({"weight_map": {"a": "../good/model.safetensors"}}).encode()
    cases = {
        tmp_path / "nowhere": "model.safetensors is missing",
        damaged("cut", "model.safetensors", whole[:-1]): "lies outside the file",
        damaged("empty", "model.safetensors", b""): "model.safetensors is damaged",
        damaged("text", "model.safetensors", b"not a tensor file"): "model.safetensors is damaged",
        damaged("index", index, b"[]"): "is not a list of shards",
        damaged(
            "lost", index, b'{"weight_map": {"a": "x.safetensors"}}'
        ): "x.safetensors is missing",
        damaged("outside", index, outside): "names files outside",
        twice: "two files hold the tensor 'a.weight'",
    }
    for directory, reason in cases.items():
        with pytest.raises(InvalidRequestError) as refused:
            read_base_facts(directory)
        assert reason in refused.value.message
        assert refused.value.param == "base"
