"""Adapters changed over HTTP: what is published answers at once, what is refused says why and leaves nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from deployments import adapter_admin
from deployments.adapter_sources import AdapterSources
from deployments.settings import Settings
from deployments.upload import Upload
from storage.adapter_directory import write_directory
from storage.errors import AdapterCorruptError
from storage.identity import AdapterName, AdapterVersion
from storage.registry import Registry
from tests.conftest import S3Endpoint
from tests.deployments.conftest import local_replica, served
from tests.deployments.world import BASE_ID, World, settings_for

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Office:
    """A server that takes adapters, with a place of each kind it may take them from."""

    http: httpx.Client
    world: World
    directory: Path
    bucket: str
    s3: Any

    def files(self, seed: int = 0, rank: int = 2) -> dict[str, bytes]:
        return self.world.files(rank, seed, "flora")

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, path, **options)

    def upload(self, name: str, files: dict[str, bytes], **fields: str) -> httpx.Response:
        parts = [("files", item) for item in files.items()]
        return self.call("POST", "/v1/adapters", data={"name": name, **fields}, files=parts)

    def push(self, name: str, seed: int = 0, **fields: str) -> AdapterVersion:
        """An upload that must succeed."""
        response = self.upload(name, self.files(seed), **fields)
        assert response.status_code == 201, response.text
        return AdapterVersion(response.json()["version"])

    def show(self, name: str) -> Any:
        return self.call("GET", f"/v1/adapters/{name}").json()

    def answered_by(self, model: str) -> str | None:
        body = {"model": model, "prompt": "the", "max_tokens": 2}
        response = self.call("POST", "/v1/completions", json=body)
        return response.headers.get("x-adapter-version") if response.is_success else None

    @property
    def registry(self) -> Registry:
        return self.world.registry


@pytest.fixture(scope="module", params=["directory", "s3"])
def office(
    request: pytest.FixtureRequest,
    tiny_llama_dir: Path,
    s3_endpoint: S3Endpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Office]:
    place = tmp_path_factory.mktemp("office")
    sources = place / "sources"
    sources.mkdir()
    settings = _settings(
        settings_for(
            tiny_llama_dir,
            place,
            adapter_sources=(str(sources), f"s3://{s3_endpoint.bucket}/models"),
        ),
        s3_endpoint_url=s3_endpoint.url,
        max_adapter_bytes=200_000,
        **(
            {"registry": f"s3://{s3_endpoint.bucket}/{place.name}"} if request.param == "s3" else {}
        ),
    )
    world = World.create(tiny_llama_dir, settings)
    s3 = boto3.client("s3", endpoint_url=s3_endpoint.url)
    with local_replica(world) as gateway, served(world, gateway) as (url, _):
        http = httpx.Client(base_url=url, timeout=60)
        yield Office(http, world, sources, s3_endpoint.bucket, s3)


def _settings(settings: Settings, **storage: Any) -> Settings:
    changed = settings.storage.model_copy(update=storage)
    return settings.model_copy(update={"storage": changed})


def error_of(response: httpx.Response) -> Any:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_an_upload_is_published_and_answers_at_once(office: Office) -> None:
    response = office.upload("poet", office.files(1), alias="latest")
    assert response.status_code == 201, response.text
    told = response.json()
    assert (told["id"], told["parent"], told["alias"]) == ("poet", BASE_ID, "latest")
    assert (told["family"], told["rank"]) == ("flora", 2)
    assert office.answered_by("poet") == told["version"]
    stored = office.registry.manifest(AdapterName("default", "poet"), told["version"])
    assert {
        name: office.registry.read_file(entry) for name, entry in stored.content.files.items()
    } == office.files(1)
    models = office.call("GET", "/v1/models").json()["data"]
    assert "poet" in [model["id"] for model in models]


def test_the_same_upload_twice_is_one_version(office: Office) -> None:
    assert office.push("twice", 2) == office.push("twice", 2)
    assert len(office.show("twice")["versions"]) == 1


def test_an_adapter_is_shown_with_aliases_history_and_where_it_lies(office: Office) -> None:
    first, second = office.push("shown", 3), office.push("shown", 4)
    assert office.answered_by("shown") == second
    shown = office.show("shown")
    assert shown["aliases"] == {"latest": second} == shown["serving"]
    assert shown["history"] == {"latest": [first]}
    assert [each["version"] for each in shown["versions"]] == [first, second]
    assert all(each["quarantined"] is None for each in shown["versions"])
    missing = office.call("GET", "/v1/adapters/nobody")
    assert (missing.status_code, error_of(missing)["param"]) == (404, "name")


def test_aliases_move_and_roll_back(office: Office) -> None:
    first, second = office.push("moved", 5, alias="prod"), office.push("moved", 6, alias="prod")
    path = "/v1/adapters/moved/aliases"
    moved = office.call("PUT", f"{path}/prod", json={"version": first[:12]})
    assert (moved.status_code, moved.json()["version"]) == (200, first)
    assert office.answered_by("moved@prod") == first
    made = office.call("PUT", f"{path}/canary", json={"version": "prod"})
    assert made.json()["version"] == first
    back = office.call("POST", f"{path}/prod/rollback")
    assert back.json()["version"] == second
    unknown = office.call("PUT", f"{path}/prod", json={"version": "0" * 64})
    assert unknown.status_code == 404
    bad = office.call("PUT", f"{path}/No Name", json={"version": first})
    assert (bad.status_code, error_of(bad)["param"]) == (400, "alias")


def test_a_version_and_an_adapter_are_deleted(office: Office) -> None:
    first, second = office.push("gone", 7), office.push("gone", 8)
    held = office.call("DELETE", f"/v1/adapters/gone/versions/{second}")
    assert held.status_code == 400 and "latest" in error_of(held)["message"]
    deleted = office.call("DELETE", f"/v1/adapters/gone/versions/{first[:12]}")
    assert deleted.json() == {
        "id": "gone",
        "object": "adapter.version",
        "version": first,
        "deleted": True,
    }
    assert [each["version"] for each in office.show("gone")["versions"]] == [second]
    assert office.call("DELETE", "/v1/adapters/gone").json()["deleted"] is True
    assert office.call("GET", "/v1/adapters/gone").status_code == 404
    assert office.answered_by("gone") is None
    assert office.call("DELETE", "/v1/adapters/gone").status_code == 404


def test_a_pin_is_kept_shown_and_taken_away(office: Office) -> None:
    office.push("pinned", 9)
    assert office.call("PUT", "/v1/adapters/pinned/pin", json={"copies": 2}).status_code == 200
    assert office.show("pinned")["pinned_copies"] == 2
    assert office.call("DELETE", "/v1/adapters/pinned/pin").json()["copies"] == 0
    assert office.show("pinned")["pinned_copies"] == 0
    none = office.call("PUT", "/v1/adapters/pinned/pin", json={"copies": 0})
    assert (none.status_code, error_of(none)["param"]) == (400, "copies")
    assert office.call("PUT", "/v1/adapters/nobody/pin", json={"copies": 1}).status_code == 404


def test_what_is_in_quarantine_is_told_and_not_answered_by(office: Office) -> None:
    good, bad = office.push("hurt", 10), office.push("hurt", 11)
    content = office.registry.content(bad)
    entry = content.files[TENSORS]
    store = office.registry._store
    key = f"blobs/sha256/{entry.sha256}"
    data = bytearray(store.get(key).data)
    data[-1] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(AdapterCorruptError):
        office.registry.read_file(entry)
    assert office.registry.quarantine(bad, "a flipped bit")
    office.push("other", 12)  # after it, every list is up to date
    shown = office.show("hurt")
    assert shown["aliases"] == {"latest": bad} and shown["serving"] == {"latest": good}
    assert "flipped bit" in shown["versions"][1]["quarantined"]
    assert office.answered_by("hurt") == good
    named = office.call(
        "POST", "/v1/completions", json={"model": f"hurt@{bad}", "prompt": "a", "max_tokens": 1}
    )
    assert named.status_code == 503 and "flipped bit" in error_of(named)["message"]
    assert office.push("hurt", 11) == bad
    assert office.answered_by("hurt") == bad


def broken(files: dict[str, bytes], **changes: bytes | None) -> dict[str, bytes]:
    changed = {**files, **{name.replace("__", "."): data for name, data in changes.items()}}
    return {name: data for name, data in changed.items() if data is not None}


@pytest.mark.parametrize(
    ("changes", "status", "named"),
    [
        ({"adapter_config__json": b"{not json"}, 422, CONFIG),
        ({"adapter_config__json": None}, 422, CONFIG),
        ({"adapter_model__safetensors": None}, 422, TENSORS),
        ({"adapter_model__safetensors": b"junk"}, 422, TENSORS),
        ({"adapter_config__json": None, "adapter_model__safetensors": None}, 422, CONFIG),
    ],
)
def test_broken_files_are_refused_by_name_and_nothing_is_kept(
    office: Office, changes: dict[str, bytes | None], status: int, named: str
) -> None:
    refused = office.upload("refused", broken(office.files(), README__md=b"hello", **changes))
    assert refused.status_code == status, refused.text
    assert named in error_of(refused)["message"]
    assert "refused" not in {name.name for name in office.registry.list()}
    assert office.call("GET", "/v1/adapters/refused").status_code == 404


def test_an_adapter_of_another_base_is_a_conflict(office: Office) -> None:
    own = office.world.base.digest.encode()
    files = {name: data.replace(own, b"0" * 64) for name, data in office.files().items()}
    refused = office.upload("foreign", files)
    assert refused.status_code == 409 and error_of(refused)["code"] == "base_mismatch"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"name": "Not A Name"}, 400, "name"),
        ({"name": BASE_ID}, 409, "name"),
        ({"alias": "Not An Alias"}, 400, "alias"),
        ({"colour": "red"}, 400, "colour"),
        ({"name": "a" * 2000}, 400, "name"),
    ],
)
def test_a_bad_field_of_an_upload_is_named(
    office: Office, fields: dict[str, str], status: int, param: str
) -> None:
    refused = office.upload(files=office.files(), **{"name": "named", **fields})
    assert refused.status_code == status, refused.text
    assert error_of(refused)["param"] == param
    assert office.call("GET", "/v1/adapters/named").status_code == 404


def test_an_upload_over_the_limit_is_a_413_whether_or_not_it_says_its_length(
    office: Office,
) -> None:
    large = {CONFIG: b"{}", TENSORS: b"\0" * 3_000_000}
    told = office.upload("large", large)
    assert told.status_code == 413 and error_of(told)["code"] == "body_too_large"

    request = httpx.Request(
        "POST", "http://office", files=[("files", item) for item in large.items()]
    )
    body = request.read()
    chunks = (body[at : at + 10_000] for at in range(0, len(body), 10_000))
    headers = {"content-type": request.headers["content-type"]}
    streamed = office.call("POST", "/v1/adapters", content=chunks, headers=headers)
    assert streamed.status_code == 413
    assert office.call("GET", "/v1/adapters/large").status_code == 404


def test_an_upload_cut_short_is_refused(office: Office) -> None:
    request = httpx.Request(
        "POST", "http://office", data={"name": "cut"}, files=[("files", (CONFIG, b"{}"))]
    )
    headers = {"content-type": request.headers["content-type"]}
    cut = office.call("POST", "/v1/adapters", content=request.read()[:-20], headers=headers)
    assert cut.status_code == 400 and "ends before" in error_of(cut)["message"]
    plain = office.call("POST", "/v1/adapters", content=b"hello")
    assert plain.status_code == 400 and "multipart" in error_of(plain)["message"]


def put(office: Office, prefix: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        office.s3.put_object(Bucket=office.bucket, Key=f"{prefix}/{name}", Body=data)
    return f"s3://{office.bucket}/{prefix}"


def register(office: Office, name: str, source: str, **fields: Any) -> httpx.Response:
    return office.call("POST", "/v1/adapters", json={"name": name, "source": source, **fields})


def test_an_adapter_is_registered_from_an_allowed_place(office: Office) -> None:
    source = put(office, "models/here", {**office.files(20), "README.md": b"hello"})
    told = register(office, "imported", source, alias="prod")
    assert told.status_code == 201, told.text
    assert told.json()["source"] == "import"
    assert office.answered_by("imported@prod") == told.json()["version"]
    assert office.answered_by("imported") is None  # there is no such alias

    write_directory(office.directory / "local", office.files(21))
    local = register(office, "from-disk", str(office.directory / "local"), alias=None)
    assert local.status_code == 201, local.text
    assert office.show("from-disk")["aliases"] == {}


def test_any_other_place_is_refused_and_an_empty_one_is_told(office: Office) -> None:
    hidden = put(office, "models-secret/here", office.files(22))
    secret = office.directory.parent / "secret"
    write_directory(secret, office.files(22))
    (office.directory / "link").symlink_to(secret)
    (office.directory / "links").mkdir()
    for name in (CONFIG, TENSORS):
        (office.directory / "links" / name).symlink_to(secret / name)
    for source in (
        hidden,
        f"s3://{office.bucket}/models/../models-secret/here",
        f"s3://{office.bucket}",
        "s3://",
        str(secret),
        str(office.directory / ".." / "secret"),
        str(office.directory / "link"),
        str(office.directory / "links"),
        "/etc",
        "secret",
    ):
        refused = register(office, "stolen", source)
        assert refused.status_code == 403, (source, refused.text)
        assert error_of(refused)["code"] == "source_not_allowed"
    for empty in (f"s3://{office.bucket}/models/none", str(office.directory / "none")):
        told = register(office, "empty", empty)
        assert told.status_code == 404 and empty in error_of(told)["message"]
    odd = register(office, "odd", "http://host/adapter")
    assert (odd.status_code, error_of(odd)["param"]) == (400, "source")
    large = put(office, "models/large", {CONFIG: b"{}", TENSORS: b"\0" * 300_000})
    assert register(office, "large", large).status_code == 422


@pytest.mark.parametrize(
    ("body", "param"),
    [({"name": "x"}, "source"), ({"source": "s3://a/b"}, "name")],
)
def test_a_registration_without_its_fields_is_refused(
    office: Office, body: dict[str, Any], param: str
) -> None:
    refused = office.call("POST", "/v1/adapters", json=body)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)


def test_a_registration_that_is_wrong_is_told_as_other_bodies_are(office: Office) -> None:
    def code_and_param(response: httpx.Response) -> tuple[int, str, str | None]:
        error = error_of(response)
        return response.status_code, error["code"], error["param"]

    unknown = register(office, "x", "s3://a/b", colour=1)
    assert code_and_param(unknown) == (400, "unsupported_field", "colour")
    as_json = {"content-type": "application/json"}
    for broken in (b"{not json", b"\xff", b"[" * 100_000):
        answer = office.call("POST", "/v1/adapters", content=broken, headers=as_json)
        assert code_and_param(answer) == (400, "invalid_value", None), broken[:9]
    no_object = office.call("POST", "/v1/adapters", json=[1])
    assert code_and_param(no_object) == (400, "invalid_value", None)


def test_one_adapter_is_in_memory_at_a_time_however_it_comes(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []
    most_inside = 0
    together = threading.Barrier(2)
    publish = adapter_admin.publish_adapter

    def noted(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any) -> Any:
            nonlocal most_inside
            inside.append("one")
            most_inside = max(most_inside, len(inside))
            with suppress(threading.BrokenBarrierError):
                together.wait(0.2)  # for somebody else, who must not come
            return read(*args)

        return reading

    def published(*args: Any, **options: Any) -> Any:
        try:
            return publish(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(AdapterSources, "read", noted(AdapterSources.read))
    monkeypatch.setattr(Upload, "read", noted(Upload.read))
    monkeypatch.setattr(adapter_admin, "publish_adapter", published)
    source = put(office, "models/one-by-one", office.files(50))
    body = {"lora_name": "third", "lora_path": source}
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(office.upload, "first", office.files(51)),
            pool.submit(register, office, "second", source),
            pool.submit(office.call, "POST", "/v1/load_lora_adapter", json=body),
            pool.submit(office.upload, "fourth", office.files(52)),
        ]
    assert [each.result().is_success for each in answers] == [True] * 4
    assert most_inside == 1


def test_lists_are_complete_and_paged(office: Office) -> None:
    for number in range(3):
        office.push(f"page-{number}", 30 + number)
    for path in ("/v1/adapters", "/v1/models"):
        whole = office.call("GET", path).json()
        ids = [each["id"] for each in whole["data"]]
        assert whole["has_more"] is False and len(ids) >= 4
        paged: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = office.call("GET", path, params={"limit": 2, **after}).json()
            assert len(page["data"]) <= 2
            paged += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                break
            assert page["last_id"] == page["data"][-1]["id"]
            after = {"after": page["last_id"]}
        assert paged == ids
        assert office.call("GET", path, params={"limit": 0}).status_code == 400
        beyond = office.call("GET", path, params={"after": "zzz"}).json()
        assert beyond["data"] == [] and beyond["has_more"] is False


def test_other_servers_ways_to_load_and_unload(office: Office) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return office.call("POST", f"/v1/{path}_lora_adapter", json=body)

    first = put(office, "models/lora-1", office.files(40))
    second = put(office, "models/lora-2", office.files(41))
    loaded = post("load", lora_name="lora", lora_path=first)
    assert (loaded.status_code, loaded.text) == (
        200,
        "Success: LoRA adapter 'lora' added successfully.",
    )
    version = office.answered_by("lora")
    assert version is not None
    again = post("load", lora_name="lora", lora_path=second)
    assert again.status_code == 400
    assert "'lora' has already been loaded" in error_of(again)["message"]
    assert post("load", lora_name="lora", lora_path=second, load_inplace=True).status_code == 200
    assert office.answered_by("lora") not in (None, version)
    gone = post("unload", lora_name="lora")
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'lora' removed successfully.",
    )
    assert office.answered_by("lora") is None
    missing = post("unload", lora_name="lora")
    assert missing.status_code == 404
    assert error_of(missing)["message"] == "The lora adapter 'lora' cannot be found."
    assert post("load", lora_name="lora", lora_path=first).status_code == 200
    assert office.answered_by("lora") == version

    neither = post("load", lora_name="lora")
    assert neither.status_code == 400
    assert error_of(neither)["message"] == "Both 'lora_name' and 'lora_path' must be provided."
    assert post("unload").status_code == 400
    assert post("load", lora_name="lora-9", lora_path="/etc").status_code == 403
