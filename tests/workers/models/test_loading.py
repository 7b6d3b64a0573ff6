"""A base model is found, loaded and named by its files, or the user is told what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from storage.base_checkpoint import read_base_facts
from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from tests.conftest import S3Endpoint
from workers.config import EngineSettings
from workers.models.loading import load_base, load_config, load_tokenizer, with_local_base

CPU = torch.device("cpu")


def test_a_directory_loads_frozen_with_the_digest_of_its_files(tiny_llama_dir: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        base = load_base(str(tiny_llama_dir), dtype, CPU)
        assert base.digest == read_base_facts(tiny_llama_dir).digest
        assert base.directory == tiny_llama_dir
        assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert not base.model.training
        assert base.tokenizer.decode(base.tokenizer.encode("a lazy dog")) == "a lazy dog"


def test_a_missing_directory_says_how_to_get_one() -> None:
    with pytest.raises(InvalidRequestError, match="flora base pull"):
        load_base("~/no/such/model", torch.float32, CPU)
    with pytest.raises(InvalidRequestError, match="flora base pull"):
        load_tokenizer("no-such-model")


def test_a_directory_without_a_model_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError, match="no model at owner/model"):
        load_base("owner/model", torch.float32, CPU)


def test_a_hub_that_cannot_be_reached_is_not_called_a_missing_model() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(StoreUnavailableError, match="flora base pull"):
        load_base("some-owner/some-model", torch.float32, CPU)


def test_a_damaged_model_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_llama_dir, damaged)
    (damaged / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(InvalidRequestError, match="does not load as a causal language model"):
        load_base(str(damaged), torch.float32, CPU)
    (damaged / "tokenizer.json").write_text("{}")
    (damaged / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRequestError, match="no tokenizer that loads"):
        load_tokenizer(str(damaged))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"is quantised \(awq\)"),
        (
            {
                "model_type": "own",
                "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
            },
            "custom code",
        ),
        ({"vocab_size": 7}, "does not load as a causal language model"),
    ],
)
def test_what_would_not_be_the_model_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps(config | changes))
    (other / "own.py").write_text("raise SystemExit('code of a stranger')")
    with pytest.raises(InvalidRequestError, match=reason):
        load_base(str(other), torch.float32, CPU)


def test_shards_are_one_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = load_base(str(tiny_llama_dir), torch.float32, CPU)
    whole.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = load_base(str(tmp_path), torch.float32, CPU)
    assert sharded.digest == whole.digest
    expected = whole.model.state_dict()
    for name, tensor in sharded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(InvalidRequestError, match=r"model-00001-of-.* is missing"):
        load_base(str(tmp_path), torch.float32, CPU)


def test_a_model_in_s3_is_the_model_that_was_put_there(
    tiny_llama_dir: Path, s3_endpoint: S3Endpoint, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint.url)
    for file in tiny_llama_dir.iterdir():
        client.upload_file(str(file), s3_endpoint.bucket, f"bases/tiny/{file.name}")
    storage = StorageSettings(s3_endpoint_url=s3_endpoint.url, cache_dir=tmp_path)
    named = EngineSettings(base=f"s3://{s3_endpoint.bucket}/bases/tiny", max_sequence_tokens=99)
    settings = with_local_base(named, storage)
    assert settings == named.model_copy(update={"base": settings.base})
    base = load_base(settings.base, torch.float32, CPU)
    assert base.digest == read_base_facts(tiny_llama_dir).digest
    assert base.tokenizer.decode(base.tokenizer.encode("a lazy dog")) == "a lazy dog"
    assert load_config(settings.base).model_type == "llama"


def test_weights_are_required_to_be_safetensors(tiny_llama_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_llama_dir / "config.json", bare)
    with pytest.raises(InvalidRequestError, match="safetensors"):
        load_base(str(bare), torch.float32, CPU)
