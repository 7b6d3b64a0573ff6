"""A base model as a GGUF file: the same answers as the model it was made from, adapters included, and another base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

from storage.base_checkpoint import read_base_facts
from storage.base_layout import gguf_projections
from storage.errors import BaseMismatchError, InvalidRequestError
from tests.workers.engine.small_engine import (
    greedy,
    projections,
    prompt,
    random_adapter,
    run,
    small_engine,
    version,
)
from tests.workers.models.families import linear_shapes, loaded, save_family
from tests.workers.models.tiny_gguf import write_gguf
from workers.models.loading import find_base, load_base, load_config, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A safetensors directory, and a GGUF file of the same values."""
    folder = tmp_path_factory.mktemp("gguf")
    directory, file = folder / "tiny", folder / "packed" / "tiny.Q8_0.gguf"
    shutil.copytree(tiny_llama_dir, directory)
    file.parent.mkdir()
    write_gguf(directory, file)
    return directory, file


def test_answers_are_those_of_the_model_it_was_made_from(made: tuple[Path, Path]) -> None:
    directory, file = made
    shapes = projections(directory)
    adapters = {
        version(0): random_adapter(shapes, "flora", 3, seed=1),
        version(1): random_adapter(shapes, "lora", 2, seed=2),
    }
    users = (None, version(0), version(1))
    requests = [greedy(f"r{i}", prompt(i, 5 + i), user) for i, user in enumerate(users)]
    expected = run(small_engine(directory, adapters), requests)
    # The file itself, and the directory it lies in.
    for place in (file, file.parent):
        answers = run(small_engine(place, adapters), requests)
        for name, answer in answers.items():
            assert answer.tokens == expected[name].tokens
    assert len({tuple(one.tokens) for one in expected.values()}) == len(requests)


def test_layers_configuration_and_tokenizer_are_read_from_the_file(
    made: tuple[Path, Path],
) -> None:
    directory, file = made
    assert read_base_facts(file).projections == read_base_facts(directory).projections
    assert read_base_facts(file).name == "tiny.Q8_0"
    assert load_config(str(file)).max_position_embeddings == 512
    text = "the quick brown fox<|im_end|>"
    assert load_tokenizer(str(file)).encode(text) == load_tokenizer(str(directory)).encode(text)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma2", "gemma2"),
        ("gemma3", "gemma3"),
        ("phi3", "phi3"),
        ("starcoder2", "starcoder2"),
        ("gpt2", "gpt2"),
    ],
)
def test_layers_have_the_names_that_ggufs_own_table_gives_them(
    name: str, architecture: str, tmp_path: Path
) -> None:
    shapes = linear_shapes(loaded(save_family(name, tmp_path)))
    kinds = {kind: number for number, kind in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[architecture], 2)
    tensors = [(f"{names.get_name(path)}.weight", shape) for path, shape in shapes.items()]
    assert gguf_projections(architecture, tensors) == shapes


def test_it_is_another_base_than_the_model_it_was_made_from(made: tuple[Path, Path]) -> None:
    directory, file = made
    facts = read_base_facts(file)
    assert facts.digest == read_base_facts(file.parent).digest
    assert facts.digest == load_base(str(file), torch.float32, CPU).digest
    assert facts.digest != read_base_facts(directory).digest
    bound = random_adapter(projections(directory), "flora", 2, seed=1)
    bound = type(bound)(bound.modules, base_digest=read_base_facts(directory).digest)
    answers = run(small_engine(file, {version(0): bound}), [greedy("r", prompt(0, 5), version(0))])
    assert isinstance(answers["r"].error, BaseMismatchError)


def test_the_digest_is_of_every_byte(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, file = made
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(data)
    assert read_base_facts(tmp_path / "other.gguf").digest != read_base_facts(file).digest


def test_what_cannot_be_read_is_refused_with_the_reason(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    _, file = made
    (tmp_path / "several").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / "several" / name)
    part = tmp_path / "tiny-00001-of-00002.gguf"
    shutil.copy(file, part)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no such thing")
    unknown = tmp_path / "unknown.gguf"
    writer = GGUFWriter(unknown, "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    cases = {
        tmp_path / "several": "several GGUF files; name one of a.gguf, b.gguf",
        part: "merge the parts first",
        broken: "broken.gguf is damaged or no GGUF file",
        unknown: "architecture 'rwkv7'; as GGUF only",
    }
    for place, reason in cases.items():
        with pytest.raises(InvalidRequestError, match=reason):
            load_base(str(place), torch.float32, CPU)
    with pytest.raises(InvalidRequestError, match="no model at"):
        find_base(str(tmp_path / "none.gguf"))
