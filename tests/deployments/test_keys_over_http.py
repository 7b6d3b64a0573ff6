"""A server that needs keys: who gets in, whose adapters they see, and what only admins may do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.key_store import KeyStore
from cluster.keys import new_key
from deployments.app import check_door
from storage.errors import SpecificationError
from storage.identity import SHARED_TENANT, AdapterName, AdapterVersion
from storage.publishing import publish_adapter
from storage.stores import open_store
from tests.deployments.conftest import local_replica, served
from tests.deployments.world import BASE_ID, World, settings_for


@dataclass
class House:
    """A server with two tenants and what everybody shares."""

    url: str
    http: httpx.Client
    world: World
    keys: KeyStore
    admin: str
    ann: str
    bob: str

    def call(self, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return self.http.request(method, path, headers=headers, **options)

    def models(self, key: str) -> list[str]:
        return [each["id"] for each in self.call(key, "GET", "/v1/models").json()["data"]]

    def ask(self, key: str, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "the", "max_tokens": 2}
        return self.call(key, "POST", "/v1/completions", json=body)


def publish(world: World, tenant: str, name: str, seed: int) -> AdapterVersion:
    files = world.files(2, seed, "flora")
    return publish_adapter(world.registry, AdapterName(tenant, name), files, world.base).version


@pytest.fixture(scope="module")
def house(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    settings = settings_for(tiny_llama_dir, tmp_path_factory.mktemp("house"), allow_anonymous=False)
    with pytest.raises(SpecificationError, match="flora keys create"):
        check_door(settings)
    world = World.create(tiny_llama_dir, settings)
    keys = KeyStore(open_store(settings.storage))
    made = {
        name: new_key(name, is_admin=name == "ops", created_s=1.0) for name in ("ops", "ann", "bob")
    }
    for each in made.values():
        keys.add(each.key)
    check_door(settings)
    for tenant, name, seed in (
        ("ann", "secret", 1),
        ("ann", "poet", 2),
        (SHARED_TENANT, "poet", 3),
        (SHARED_TENANT, "guide", 4),
    ):
        publish(world, tenant, name, seed)
    with (
        local_replica(world) as gateway,
        served(world, gateway) as (url, _),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield House(url, http, world, keys, *(made[name].token for name in ("ops", "ann", "bob")))


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "authentication_required"),
        ("Basic abc", "authentication_required"),
        ("Bearer", "authentication_required"),
        ("Bearer none", "invalid_api_key"),
        ("Bearer flora-000000000000-" + "a" * 43, "invalid_api_key"),
    ],
)
def test_without_a_known_key_nobody_gets_in(house: House, header: str | None, code: str) -> None:
    headers = {} if header is None else {"authorization": header}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/adapters"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
    ):
        response = house.http.request(method, path, headers=headers)
        assert code_of(response) == (401, code), path
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/version", "/docs", "/openapi.json"):
        assert house.http.get(path).status_code == 200


def test_each_tenant_sees_its_own_adapters_and_shared_ones(house: House) -> None:
    assert house.models(house.ann) == [BASE_ID, "guide", "poet", "secret"]
    assert house.models(house.bob) == [BASE_ID, "guide", "poet"]
    listed = house.call(house.bob, "GET", "/v1/adapters").json()["data"]
    assert [(each["id"], each["tenant"]) for each in listed] == [
        ("guide", SHARED_TENANT),
        ("poet", SHARED_TENANT),
    ]


def test_another_tenants_adapter_is_as_unknown_as_none(house: House) -> None:
    assert house.ask(house.ann, "secret").status_code == 200
    answers = [house.ask(house.bob, model).json() for model in ("secret", "nobody")]
    assert [each["error"]["code"] for each in answers] == ["model_not_found"] * 2
    told = [each["error"]["message"] for each in answers]
    assert told[0].replace("secret", "nobody") == told[1]
    assert house.call(house.bob, "GET", "/v1/models/secret").status_code == 404
    assert house.call(house.bob, "GET", "/v1/adapters/secret").status_code == 404


def test_a_tenants_own_adapter_comes_before_a_shared_one_of_its_name(house: House) -> None:
    resolve = house.world.registry.resolve
    for key, tenant in ((house.ann, "ann"), (house.bob, SHARED_TENANT)):
        answer = house.ask(key, "poet")
        assert answer.headers["x-adapter-version"] == resolve(AdapterName(tenant, "poet"))
    assert house.ask(house.bob, "guide").status_code == 200


def test_only_an_admin_changes_adapters_and_looks_at_the_cluster(house: House) -> None:
    for method, path, body in (
        ("POST", "/v1/adapters", {"name": "x", "source": "s3://a/b"}),
        ("DELETE", "/v1/adapters/secret", None),
        ("DELETE", "/v1/adapters/secret/versions/latest", None),
        ("PUT", "/v1/adapters/secret/aliases/prod", {"version": "latest"}),
        ("POST", "/v1/adapters/secret/aliases/latest/rollback", None),
        ("PUT", "/v1/adapters/secret/pin", {"copies": 1}),
        ("DELETE", "/v1/adapters/secret/pin", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "secret"}),
        ("GET", "/v1/cluster", None),
        ("GET", "/metrics", None),
    ):
        refused = house.call(house.ann, method, path, json=body)
        assert code_of(refused) == (403, "admin_key_required"), path
    assert house.ask(house.ann, "secret").status_code == 200
    assert house.call(house.admin, "GET", "/v1/cluster").status_code == 200
    assert house.call(house.admin, "GET", "/metrics").status_code == 200


def test_an_admin_acts_for_the_tenant_it_names(house: House) -> None:
    files = [("files", item) for item in house.world.files(2, 9, "flora").items()]
    made = house.call(
        house.admin, "POST", "/v1/adapters", data={"name": "new", "tenant": "bob"}, files=files
    )
    assert (made.status_code, made.json()["tenant"]) == (201, "bob")
    assert house.ask(house.bob, "new").status_code == 200
    assert house.ask(house.ann, "new").status_code == 404
    assert house.call(house.ann, "GET", "/v1/adapters?tenant=bob").status_code == 403
    assert house.call(house.admin, "GET", "/v1/adapters/new?tenant=bob").status_code == 200
    assert house.call(house.admin, "GET", "/v1/adapters/new").status_code == 404
    assert house.call(house.admin, "DELETE", "/v1/adapters/new?tenant=bob").status_code == 200
    assert house.ask(house.bob, "new").status_code == 404


def test_a_key_opens_as_soon_as_it_is_made_and_soon_after_it_is_revoked_no_more(
    house: House,
) -> None:
    fresh = new_key("ann", is_admin=False, created_s=2.0)
    assert house.call(fresh.token, "GET", "/v1/models").status_code == 401
    house.keys.add(fresh.key)
    deadline_s = time.monotonic() + 10
    while house.call(fresh.token, "GET", "/v1/models").status_code != 200:
        assert time.monotonic() < deadline_s
    house.keys.revoke(fresh.key.key_id)
    while house.call(fresh.token, "GET", "/v1/models").status_code != 401:
        assert time.monotonic() < deadline_s


def test_the_stock_client_works_with_a_key_and_says_so_without(house: House) -> None:
    client = openai.OpenAI(base_url=f"{house.url}/v1", api_key=house.ann, max_retries=0)
    assert client.completions.create(model="secret", prompt="a", max_tokens=1).choices
    stranger = openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/unload_lora_adapter", body={"lora_name": "secret"}, cast_to=object)
