"""A wrong specification says where it is wrong, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import boto3
import pytest

from storage.config import StorageSettings
from storage.errors import SpecificationError, StoreUnavailableError
from tests.storage.s3_server import s3_server
from training.spec_file import parse_spec, read_spec

GOOD_LINE = json.dumps({"prompt": "a", "completion": "b"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.jsonl").write_text(GOOD_LINE + "\n")
    (tmp_path / "other.jsonl").write_text(GOOD_LINE + "\n")
    return tmp_path


def written(folder: Path, text: str, name: str = "spec.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_specification_is_read_with_defaults_under_every_adapter(folder: Path) -> None:
    spec = read_spec(
        written(
            folder,
            """
base: some/base-Model
seed: 5
defaults: {batch_size: 2, steps: 10, data: small.jsonl}
adapters:
  - {name: one, rank: 1}
  - {name: two, rank: 2, batch_size: 8, data: other.jsonl, seed: 9}
  - {name: three, family: lora, rank: 4, alpha: 8}
""",
        )
    )
    one, two, three = spec.adapters
    assert spec.base_id == "base-model"
    assert (one.batch_size, one.seed, one.learning_rate) == (2, 5, 8e-3)
    assert (two.batch_size, two.seed, two.data) == (8, 9, folder / "other.jsonl")
    assert (three.learning_rate, three.scaling_of("x.q_proj")) == (2e-4, 2.0)


def test_json_is_as_good_as_yaml(folder: Path) -> None:
    values = {"base": "b", "adapters": [{"name": "one", "rank": 1, "data": "small.jsonl"}]}
    path = written(folder, json.dumps(values, indent="\t"), "spec.json")
    assert read_spec(path).adapters[0].name == "one"


def test_a_sweep_expands_to_one_adapter_for_each_combination(folder: Path) -> None:
    spec = read_spec(
        written(
            folder,
            """
base: b
sweep:
  - name: "s-{rank}-{learning_rate}"
    data: small.jsonl
    over: {rank: [1, 8], learning_rate: [0.004, 8e-3]}
""",
        )
    )
    assert [(one.name, one.rank, one.learning_rate) for one in spec.adapters] == [
        ("s-1-0.004", 1, 0.004),
        ("s-1-8e-3", 1, 0.008),
        ("s-8-0.004", 8, 0.004),
        ("s-8-8e-3", 8, 0.008),
    ]


def test_overrides_replace_fields_and_reach_inside(folder: Path) -> None:
    path = written(
        folder, "base: b\ndefaults: {steps: 9}\nadapters: [{name: a, rank: 1, data: small.jsonl}]"
    )
    spec = read_spec(path, {"base": "c", "defaults.steps": 3, "adapters.0.rank": 2})
    assert (spec.base, spec.adapters[0].steps, spec.adapters[0].rank) == ("c", 3, 2)
    with pytest.raises(SpecificationError, match=r"adapters\.7\.rank"):
        read_spec(path, {"adapters.7.rank": 2})


def test_an_ia3_adapter_needs_no_rank(folder: Path) -> None:
    spec = read_spec(
        written(folder, "base: b\nadapters:\n- {name: a, family: ia3, data: small.jsonl}")
    )
    (one,) = spec.adapters
    assert (one.rank, one.learning_rate) == (1, 3e-3)
    assert one.scales_input("model.layers.0.mlp.down_proj")
    assert not one.scales_input("model.layers.0.mlp.up_proj")


ADAPTER = "{name: a, rank: 1, data: small.jsonl}"


@pytest.mark.parametrize(
    ("text", "param", "line", "says"),
    [
        (f"base: b\nadapters:\n- {ADAPTER}\n- {{name: b, rank: 0, data: small.jsonl}}",
         "adapters.1.rank", 4, "greater than or equal to 1"),
        (f"base: b\nspeed: 3\nadapters: [{ADAPTER}]", "speed", 2, "not permitted"),
        ("base: b\nadapters:\n- name: a\n  rank: 1\n  rnk: 2\n  data: small.jsonl",
         "adapters.0.rnk", 5, "not permitted"),
        ("base: b\nadapters:\n- name: a\n  rank: 1\n  data: gone.jsonl",
         "adapters.0.data", 5, "no file gone.jsonl"),
        ("base: b\nadapters:\n- name: a\n  data: small.jsonl", "adapters.0.rank", 3, "required"),
        (f"base: b\nadapters:\n- {ADAPTER}\n- {ADAPTER}", "adapters.1.name", 4, "another adapter"),
        ("base: b\ndefaults:\n  warmup_steps: -1\nadapters:\n- " + ADAPTER,
         "defaults.warmup_steps", 3, "greater than or equal to 0"),
        ("base: b\nsweep:\n- name: a-{rank}\n  data: small.jsonl\n  over:\n    rank: [1, 0]",
         "sweep.0.over.rank", 6, "greater than or equal to 1"),
        ("base: b\nsweep:\n- name: a-{seed}\n  data: small.jsonl\n  over: {rank: [1]}",
         "sweep.0.name", 3, "not one of over's fields"),
        ("base: b\nadapters:\n- {name: a, family: ia3, rank: 4, data: small.jsonl}",
         "adapters.0", 3, "IA3 has one vector"),
        ("base: b\nadapters:\n- {name: A B, rank: 1, data: small.jsonl}",
         "adapters.0.name", 3, "not a valid name"),
        ("base: b\nadapters:\n- {name: a, rank: 1, alpha: 2, data: small.jsonl}",
         "adapters.0", 3, "FLoRA has none"),
        ("base: b\nadapters:\n- {name: a, rank: 1, steps: 2, epochs: 1, data: small.jsonl}",
         "adapters.0", 3, "either steps or epochs"),
        *(
            (f"base: b\nsweep:\n- name: a-{name}\n  data: small.jsonl\n  over: {{rank: [1]}}",
             "sweep.0.name", 3, "cannot be filled in")
            for name in ("{rank.x}", "{rank[0]}", "{rank", "{}", "{rank:x!}")
        ),
        ("base: b\nadapters:\n- name: a\n  rank: 1\n  data: ~nouser/small.jsonl",
         "adapters.0.data", 5, "cannot be used as a path: .*home"),
        (f"base: b\nadapters:\n- name: a\n  rank: 1\n  data: {'x' * 300}",
         "adapters.0.data", 5, "cannot be used as a path: .*too long"),
        ("base: b\nadapters:\n- name: a\n  rank: 1\n  data: small.jsonl\n  evaluation:\n"
         f"    data: {'x' * 300}", "adapters.0.evaluation.data", 7, "too long"),
        (f"adapters: [{ADAPTER}]\nbase: ~nouser/base", "base", 2, "home"),
        (f"adapters: [{ADAPTER}]\nbase: {'x' * 300}", "base", 2, "too long"),
        ("base: b\nadapters:\n- {name: a, over: 5, data: small.jsonl}",
         "adapters.0.rank", 3, "required"),
        ("base: b\nadapters:\n- {name: a, rank: 1, epochs: .inf, data: small.jsonl}",
         "adapters.0.epochs", 3, "finite"),
        ("base: b\nbase: c\nadapters: []", "base", 2, "given twice"),
        ("base: b\nadapters: []", "adapters", 2, "at least one adapter"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_line(
    folder: Path, text: str, param: str, line: int, says: str
) -> None:
    with pytest.raises(SpecificationError, match=says) as caught:
        read_spec(written(folder, text))
    assert caught.value.param == param
    assert f"spec.yaml, line {line}: {param}: " in caught.value.message


def test_a_file_that_is_not_yaml_is_named_with_its_line(folder: Path) -> None:
    with pytest.raises(SpecificationError, match=r"spec\.yaml, line 2"):
        read_spec(written(folder, "base: b\nadapters: [a"))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("base: b\n? [a, b]\n: c", 2, "the name of a field is text"),
        ("base: b\n? {a: b}\n: c", 2, "the name of a field is text"),
        ("base: b\ndefaults: &a\n  evaluation: *a", 2, "holds itself"),
        ("base: b\nadapters: &a\n- *a", 2, "holds itself"),
        ("base: b\ndata: a\x01b", 2, "character that YAML does not allow: U\\+0001"),
        ("seed: 1\nbase: 2024-13-45", 2, "cannot be read: month"),
        ("seed: 1\nbase: !!int b", 2, "cannot be read"),
        ("seed: 1\nbase: !!bool b", 2, "cannot be read"),
        ("seed: 1\nbase: !!timestamp b", 2, "cannot be read"),
        ("seed: 1\nbase: !!python/name:os.system", 2, "could not determine a constructor"),
        ('seed: 1\nbase: "\\ud83d"', 2, "half of a character"),
        ("base: *b", 1, "undefined alias"),
    ],
)
def test_what_yaml_cannot_say_is_named_with_its_line(
    folder: Path, text: str, line: int, says: str
) -> None:
    with pytest.raises(SpecificationError, match=says) as caught:
        read_spec(written(folder, text))
    assert caught.value.message.startswith(f"spec.yaml, line {line}: ")


def test_a_file_nested_too_deep_is_refused_and_so_is_one_of_nested_aliases(folder: Path) -> None:
    with pytest.raises(SpecificationError, match=r"^spec\.yaml: is nested too deep"):
        read_spec(written(folder, "base: " + "[" * 600))
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    with pytest.raises(SpecificationError, match=r"^spec\.yaml, line 1: adapters: a job needs"):
        read_spec(written(folder, "\n".join(["a0: &a0 x", *lines])))


def test_a_bad_data_file_is_found_with_the_specification(folder: Path) -> None:
    (folder / "small.jsonl").write_text(GOOD_LINE + "\n{oops\n")
    with pytest.raises(SpecificationError, match=r"small\.jsonl, line 2: not JSON"):
        read_spec(written(folder, f"base: b\nadapters: [{ADAPTER}]"))


def test_data_in_s3_is_fetched_as_it_is_now(folder: Path) -> None:
    with s3_server() as server:
        client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
        client.create_bucket(Bucket="sets")
        client.put_object(Bucket="sets", Key="a/small.jsonl", Body=GOOD_LINE.encode())
        storage = StorageSettings(s3_endpoint_url=server.url, cache_dir=folder / "cache")
        url = "s3://sets/a/small.jsonl"
        path = written(
            folder,
            f"base: b\nadapters:\n- name: a\n  rank: 1\n  data: {url}\n"
            f"  evaluation: {{data: {url}}}",
        )
        (before,) = read_spec(path, storage=storage).adapters
        client.put_object(Bucket="sets", Key="a/small.jsonl", Body=b"{oops")
        with pytest.raises(SpecificationError, match=r"small\.jsonl, line 1: not JSON"):
            read_spec(path, storage=storage)
        client.delete_object(Bucket="sets", Key="a/small.jsonl")
        says = r"spec\.yaml, line 5: adapters\.0\.data: there is no object s3://sets/a/small"
        with pytest.raises(SpecificationError, match=says):
            read_spec(path, storage=storage)
    assert before.data.read_text() == GOOD_LINE
    assert before.evaluation is not None and before.evaluation.data == before.data
    with pytest.raises(StoreUnavailableError):
        read_spec(path, storage=storage.model_copy(update={"s3_timeout_s": 0.2}))


def test_plain_values_are_checked_as_files_are(folder: Path) -> None:
    values = {"base": "b", "adapters": [{"name": "a", "rank": 9999, "data": "small.jsonl"}]}
    with pytest.raises(SpecificationError) as caught:
        parse_spec(values, folder)
    assert caught.value.param == "adapters.0.rank"


def test_every_shipped_specification_is_valid() -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    specs = sorted(examples.glob("*.yaml"))
    assert specs
    for path in specs:
        assert read_spec(path).adapters
