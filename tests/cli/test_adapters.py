"""`flora adapters`: a person's hands on the registry, the same on a directory and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from storage.adapter_directory import write_directory
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import read_base_facts
from storage.formats.writing import write_flora
from tests.cli.conftest import Flora, as_json
from tests.conftest import S3Endpoint


def adapter_files(
    base: Path, seed: int = 0, shape: tuple[int, int] | None = None
) -> dict[str, bytes]:
    facts = read_base_facts(base, base.name)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (inputs, outputs) in facts.projections.items():
        inputs, outputs = shape or (inputs, outputs)
        modules[path] = ModuleRows(
            mul_a_RO=torch.randn(2, outputs, generator=generator),
            mul_b_RI=torch.randn(2, inputs, generator=generator),
        )
    return write_flora(AdapterRows(modules, base_digest=facts.digest), base.name)


@pytest.fixture
def adapter_dir(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    write_directory(tmp_path / "captain", adapter_files(tiny_llama_dir))
    return tmp_path / "captain"


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The flags that name a registry of either kind."""
    if request.param == "directory":
        return ["--registry", str(tmp_path / "registry")]
    endpoint: S3Endpoint = request.getfixturevalue("s3_endpoint")
    return ["--registry", f"s3://{endpoint.bucket}/{tmp_path.name}", "--s3-endpoint", endpoint.url]


def push(flora: Flora, directory: Path, base: Path, *flags: str) -> str:
    result = flora(
        "adapters", "push", "captain", str(directory), "--base", str(base), "--json", *flags
    )
    return as_json(result)["version"]


def test_an_adapter_goes_in_and_comes_out_as_it_was(
    flora: Flora, place: list[str], adapter_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    version = push(flora, adapter_dir, tiny_llama_dir, *place)
    (listed,) = as_json(flora("adapters", "ls", "--json", *place))
    assert listed["name"] == "captain"
    assert listed["aliases"] == {"latest": version}
    assert listed["versions"][0]["rank"] == 2
    flora("adapters", "pull", "captain", str(tmp_path / "copy"), *place)
    for file in adapter_dir.iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


def test_rolling_back_is_moving_an_alias(
    flora: Flora, place: list[str], adapter_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first = push(flora, adapter_dir, tiny_llama_dir, "--alias", "prod", *place)
    write_directory(tmp_path / "second", adapter_files(tiny_llama_dir, seed=1))
    second = push(flora, tmp_path / "second", tiny_llama_dir, "--alias", "prod", *place)
    assert first != second

    moved = as_json(flora("adapters", "alias", "captain", "prod", first[:12], "--json", *place))
    assert moved["version"] == first
    shown = as_json(flora("adapters", "show", "captain", "--json", *place))
    assert shown["aliases"]["prod"] == first
    assert [entry["version"] for entry in shown["versions"]] == [first, second]
    flora("adapters", "pull", f"captain@{second[:12]}", str(tmp_path / "copy"), *place)
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "second" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_deleted_adapter_is_gone_and_asked_about_first(
    flora: Flora, place: list[str], adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    push(flora, adapter_dir, tiny_llama_dir, *place)
    flora("adapters", "rm", "captain", *place, input="n\n", code=1)
    assert as_json(flora("adapters", "ls", "--json", *place))
    flora("adapters", "rm", "captain", *place, input="y\n")
    assert as_json(flora("adapters", "ls", "--json", *place)) == []
    assert "'captain' does not exist" in flora("adapters", "show", "captain", *place, code=2).stderr


def test_an_adapter_of_the_wrong_shape_is_refused_by_its_tensor(
    flora: Flora, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    write_directory(tmp_path / "wrong", adapter_files(tiny_llama_dir, shape=(8, 8)))
    arguments = (
        "adapters",
        "push",
        "wrong",
        str(tmp_path / "wrong"),
        "--base",
        str(tiny_llama_dir),
    )
    refused = flora(*arguments, code=2)
    assert "down_proj.hira_B" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert as_json(flora("adapters", "ls", "--json")) == []


def test_people_see_tables_and_no_version_is_longer_than_they_read(
    flora: Flora, adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    version = push(flora, adapter_dir, tiny_llama_dir)
    for command in (["ls"], ["show", "captain"]):
        shown = flora("adapters", *command).stdout
        assert version[:12] in shown and version not in shown


def test_the_default_registry_lies_in_the_home(
    flora: Flora, home: Path, adapter_dir: Path, tiny_llama_dir: Path
) -> None:
    push(flora, adapter_dir, tiny_llama_dir)
    assert (home / "registry" / "adapters" / "default" / "captain").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nobody"], "'nobody' does not exist"),
        (["pull", "nobody@prod", "x"], "'nobody' does not exist"),
        (["rm", "nobody", "--yes"], "'nobody' does not exist"),
        (["alias", "nobody", "prod", "latest"], "'nobody' does not exist"),
        (["show", "No Such Name"], "is not a valid name"),
        (["ls", "--registry", "gs://bucket"], "neither a directory nor s3"),
    ],
)
def test_what_is_asked_for_wrongly_is_told_in_one_line(
    flora: Flora, arguments: list[str], message: str
) -> None:
    result = flora("adapters", *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_registry_out_of_reach_is_a_failure_and_not_a_wrong_question(flora: Flora) -> None:
    flags = ["--registry", "s3://flora/x", "--s3-endpoint", "http://127.0.0.1:9"]
    assert "Error:" in flora("adapters", "ls", *flags, code=1).stderr


@pytest.mark.parametrize("family", ["dora", "ia3", "rslora", "lora"])
def test_what_peft_saved_is_pushed_and_listed_by_its_family(
    flora: Flora, tiny_llama_dir: Path, tmp_path: Path, family: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    configs = {
        "dora": LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
        "ia3": IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "rslora": LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"]),
        "lora": LoraConfig(r=3, lora_bias=True, target_modules=["q_proj"]),
    }
    get_peft_model(model, configs[family]).save_pretrained(tmp_path / "peft")
    version = push(flora, tmp_path / "peft", tiny_llama_dir)
    (listed,) = as_json(flora("adapters", "ls", "--json"))
    newest = listed["versions"][0]
    assert (newest["version"], newest["family"]) == (version, family)
    assert newest["rank"] == (1 if family == "ia3" else 3)


def test_what_cannot_be_served_is_refused_with_its_setting(
    flora: Flora, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    arguments = ("adapters", "push", "captain", str(tmp_path / "peft"), "--base")
    refused = flora(*arguments, str(tiny_llama_dir), code=2)
    assert "modules_to_save" in refused.stderr and "Traceback" not in refused.stderr
