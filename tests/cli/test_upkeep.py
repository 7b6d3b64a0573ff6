"""`flora adapters import|gc|verify|pin`, and going back: the registry kept in order by hand."""

from __future__ import annotations

import json
from pathlib import Path

import boto3
import pytest

from cli.settings import storage_settings
from storage import layout
from storage.adapter_directory import write_directory
from storage.identity import AdapterName, AdapterVersion
from storage.manifest import Provenance
from storage.object_store import ObjectStore
from storage.registry import Registry
from storage.stores import open_store
from storage.verification import Damage, Verification
from tests.cli.conftest import Flora, as_json
from tests.cli.test_adapters import adapter_files, push
from tests.conftest import S3Endpoint

CAPTAIN = AdapterName("default", "captain")


@pytest.fixture
def two_versions(flora: Flora, tmp_path: Path, tiny_llama_dir: Path) -> list[AdapterVersion]:
    """`captain` as first and second published, `latest` at the second."""
    versions = []
    for number in (1, 2):
        directory = tmp_path / f"v{number}"
        write_directory(directory, adapter_files(tiny_llama_dir, seed=number))
        versions.append(AdapterVersion(push(flora, directory, tiny_llama_dir)))
    return versions


def opened(home: Path) -> ObjectStore:
    return open_store(storage_settings(str(home / "registry"), None))


def damage(home: Path, version: AdapterVersion) -> None:
    store = opened(home)
    files = Registry(store).content(version).files
    key = layout.blob(files["adapter_model.safetensors"].sha256)
    data = bytearray(store.get(key).data)
    data[-1] ^= 1
    store.put(key, bytes(data))


def test_an_alias_goes_back_and_forth(flora: Flora, two_versions: list[AdapterVersion]) -> None:
    first, second = two_versions
    for expected in (first, second):
        back = as_json(flora("adapters", "alias", "captain", "latest", "--back", "--json"))
        assert back["version"] == expected
    shown = as_json(flora("adapters", "show", "captain", "--json"))
    moves = shown["history"]["latest"]
    assert [move["version"] for move in moves] == [second, first, second, first]
    assert [move["generation"] for move in moves] == [4, 3, 2, 1]
    flora("adapters", "alias", "captain", "other", first)
    nowhere = flora("adapters", "alias", "captain", "other", "--back", code=2)
    assert "no earlier version" in nowhere.stderr
    for wrong in ([], [first, "--back"]):
        assert "--back" in flora("adapters", "alias", "captain", "latest", *wrong, code=2).stderr


def test_one_version_is_deleted_unless_an_alias_means_it(
    flora: Flora, two_versions: list[AdapterVersion]
) -> None:
    first, second = two_versions
    refused = flora("adapters", "rm", f"captain@{second[:12]}", "--yes", code=2)
    assert "latest" in refused.stderr
    flora("adapters", "rm", f"captain@{first[:12]}", "--yes")
    shown = as_json(flora("adapters", "show", "captain", "--json"))
    assert [version["version"] for version in shown["versions"]] == [second]
    assert (
        "no earlier version"
        in flora("adapters", "alias", "captain", "latest", "--back", code=2).stderr
    )


def test_lists_come_in_pages(flora: Flora, home: Path, two_versions: list[AdapterVersion]) -> None:
    registry = Registry(opened(home))
    content = registry.content(two_versions[0])
    files = {path: registry.read_file(entry) for path, entry in content.files.items()}
    provenance = registry.manifest(CAPTAIN, content.version).provenance
    for number in range(5):
        name = AdapterName("default", f"a{number}")
        registry.publish(name, files, content, provenance=provenance)
    page = flora("adapters", "ls", "--limit", "2", "--after", "a1", "--json")
    assert [adapter["name"] for adapter in as_json(page)] == ["a2", "a3"]
    assert "--after a3" in flora("adapters", "ls", "--limit", "2", "--after", "a1").stderr
    last = flora("adapters", "ls", "--limit", "2", "--after", "a4")
    assert "captain" in last.stdout and last.stderr == ""


def test_a_flipped_bit_is_named_and_quarantined_and_publishing_again_repairs_it(
    flora: Flora,
    home: Path,
    two_versions: list[AdapterVersion],
    tmp_path: Path,
    tiny_llama_dir: Path,
) -> None:
    first, second = two_versions
    assert as_json(flora("adapters", "verify", "--json"))["damaged"] == []
    damage(home, second)
    found = as_json(flora("adapters", "verify", "--json", code=1))
    assert [(each["version"], each["quarantined"]) for each in found["damaged"]] == [(second, True)]
    assert second[:12] in flora("adapters", "verify", "captain", code=1).stdout
    assert "quarantined" in flora("adapters", "ls").stdout
    assert "In quarantine" in flora("adapters", "show", "captain").stderr
    pulled = as_json(flora("adapters", "pull", "captain", tmp_path / "copy", "--json"))
    assert pulled["version"] == first, "the version before serves"
    refused = flora("adapters", "pull", f"captain@{second}", tmp_path / "no", code=1)
    assert "quarantine" in refused.stderr
    push(flora, tmp_path / "v2", tiny_llama_dir)
    assert as_json(flora("adapters", "verify", "--json"))["damaged"] == []
    assert as_json(flora("adapters", "ls", "--json"))[0]["versions"][1]["quarantined"] is None


def test_what_others_wrote_is_text_and_not_markup(
    flora: Flora,
    home: Path,
    two_versions: list[AdapterVersion],
    tmp_path: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry(opened(home))
    content = registry.content(two_versions[0])
    files = {path: registry.read_file(entry) for path, entry in content.files.items()}
    provenance = Provenance(created_s=0.0, source="[/a]")
    registry.publish(AdapterName("default", "mate"), files, content, provenance=provenance)
    damage(home, two_versions[0])
    assert registry.quarantine(two_versions[0], "it is [/b]")
    shown = flora("adapters", "show", "mate")
    assert "[/a]" in shown.stdout and "it is [/b]" in shown.stderr

    empty = tmp_path / "[" / "e]"
    empty.mkdir(parents=True)
    base = ("--base", str(tiny_llama_dir))
    assert "[/e]" in flora("adapters", "import", str(empty), *base).stdout
    write_directory(tmp_path / "many" / "[c]", adapter_files(tiny_llama_dir))
    refused = flora("adapters", "import", str(tmp_path / "many"), *base, code=1)
    assert refused.stdout.count("[c]") == 2, "the name, and in the reason"

    found = Damage(two_versions[0], (CAPTAIN,), "bytes of [/d]", is_quarantined=True)
    monkeypatch.setattr(
        "cli.upkeep.verify_registry", lambda *_, **__: Verification(0, 0, 0, (found,))
    )
    assert "bytes of [/d]" in flora("adapters", "verify", code=1).stdout


def test_garbage_is_shown_first_and_deleted_when_asked(
    flora: Flora, two_versions: list[AdapterVersion]
) -> None:
    flora("adapters", "rm", "captain", "--yes")
    assert as_json(flora("adapters", "gc", "--json"))["versions"] == [], "the grace period"
    looked = flora("adapters", "gc", "--grace-hours", "0")
    assert "Would delete 2 deleted version(s)" in looked.stdout and "--delete" in looked.stderr
    went = as_json(flora("adapters", "gc", "--grace-hours", "0", "--delete", "--json"))
    assert {each["version"] for each in went["versions"]} == set(two_versions)
    assert went["num_bytes"] > 0 and went["files"] == 5  # 2 contents, 2 weights, 1 settings
    assert as_json(flora("adapters", "gc", "--grace-hours", "0", "--json"))["files"] == 0


def test_old_versions_go_when_asked(flora: Flora, two_versions: list[AdapterVersion]) -> None:
    looked = flora("adapters", "gc", "--keep-versions", "0", "--json")
    assert as_json(looked)["old_versions"] == [], "latest remembers both"


def test_a_pin_stays_until_it_is_taken_off(
    flora: Flora, two_versions: list[AdapterVersion]
) -> None:
    flora("adapters", "pin", "captain", "--copies", "2")
    assert as_json(flora("adapters", "ls", "--json"))[0]["pinned_copies"] == 2
    assert "2 replica" in flora("adapters", "show", "captain").stdout
    flora("adapters", "pin", "captain", "--off")
    assert as_json(flora("adapters", "ls", "--json"))[0]["pinned_copies"] == 0
    assert "'nobody' does not exist" in flora("adapters", "pin", "nobody", code=2).stderr


@pytest.fixture
def many(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A directory of adapters: two good ones, one deeper, one of a wrong shape, one with a bad name."""
    root = tmp_path / "many"
    for seed, folder in enumerate(("ahab", "bligh", "runs/cook")):
        write_directory(root / folder, adapter_files(tiny_llama_dir, seed=seed))
    write_directory(root / "wrong", adapter_files(tiny_llama_dir, shape=(8, 8)))
    write_directory(root / "Bad Name", adapter_files(tiny_llama_dir))
    (root / "README.md").write_text("not an adapter")
    return root


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_many_adapters_are_imported_and_bad_ones_hinder_no_other(
    request: pytest.FixtureRequest, flora: Flora, many: Path, tiny_llama_dir: Path, kind: str
) -> None:
    flags = ["--registry", str(many.parent / "registry"), "--base", str(tiny_llama_dir)]
    source = str(many)
    if kind == "s3":
        endpoint: S3Endpoint = request.getfixturevalue("s3_endpoint")
        client = boto3.client("s3", endpoint_url=endpoint.url, region_name="us-east-1")
        for file in filter(Path.is_file, many.rglob("*")):
            key = f"{many.parent.name}/{file.relative_to(many).as_posix()}"
            client.put_object(Bucket=endpoint.bucket, Key=key, Body=file.read_bytes())
        source = f"s3://{endpoint.bucket}/{many.parent.name}/"
        flags += ["--s3-endpoint", endpoint.url]

    def outcomes() -> dict[str, str]:
        told = as_json(flora("adapters", "import", source, "--json", *flags, code=1))
        assert all(each["what"] for each in told if each["outcome"] == "refused")
        return {each["folder"]: each["outcome"] for each in told}

    bad = {"wrong": "refused", "Bad Name": "refused"}
    good = ("ahab", "bligh", "runs/cook")
    assert outcomes() == bad | dict.fromkeys(good, "imported")
    listed = as_json(flora("adapters", "ls", "--json", *flags[:2]))
    assert [adapter["name"] for adapter in listed] == ["ahab", "bligh", "runs-cook"]
    assert {adapter["versions"][0]["source"] for adapter in listed} == {"import"}
    assert outcomes() == bad | dict.fromkeys(good, "unchanged"), "it goes on where it was stopped"
    if kind == "s3":
        flora("adapters", "push", "again", f"{source}ahab", *flags)
        shown = as_json(flora("adapters", "show", "again", "--json", *flags[:2]))
        assert shown["versions"][0]["version"] == listed[0]["versions"][0]["version"]


def test_what_is_no_place_of_adapters_is_told(
    flora: Flora, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    for place in (str(tmp_path / "nothing"), "gs://bucket/x"):
        told = flora("adapters", "import", place, "--base", tiny_llama_dir, code=2)
        assert place in told.stderr and told.stdout == ""
    empty = flora("adapters", "import", str(tmp_path), "--base", tiny_llama_dir, "--json")
    assert json.loads(empty.stdout) == []
