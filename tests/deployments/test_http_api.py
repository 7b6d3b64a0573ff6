"""The HTTP API over real HTTP and a real engine, with the stock openai client. No Ray."""

from __future__ import annotations

import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from storage.identity import AdapterName
from tests.deployments.conftest import LocalServer
from tests.deployments.world import BASE_ID

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(local_server: LocalServer) -> LocalServer:
    world = local_server.world
    world.publish("poet", rank=2, seed=1)
    world.publish("clerk", rank=3, seed=2)
    world.publish("linguist", rank=4, seed=3, family="lora")
    until(lambda: "linguist" in httpx.get(f"{local_server.url}/v1/models").text)
    return local_server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return server.openai


def post(server: LocalServer, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


def complete(server: LocalServer, **fields: Any) -> httpx.Response:
    body = {"model": BASE_ID, "prompt": "the", "max_tokens": 4, "temperature": 0, **fields}
    return post(server, "/v1/completions", **body)


def expected_text(server: LocalServer, prompt: str, model: str, max_tokens: int) -> str:
    tokens = server.codec.encode(prompt)
    return server.codec.decode(server.alone.answer(tokens, version_of(server, model), max_tokens))


def version_of(server: LocalServer, model: str) -> Any:
    if model == BASE_ID:
        return None
    return server.world.registry.resolve(AdapterName("default", model))


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.01)


def test_models_lists_the_base_first_and_adapters_with_their_parent(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [each.id for each in models][:1] == [BASE_ID]
    assert {each.id for each in models[1:]} >= {"poet", "clerk", "linguist"}
    assert {each.parent for each in models[1:]} == {BASE_ID}  # type: ignore[attr-defined]
    assert "/" not in models[0].model_dump_json()


@pytest.mark.parametrize("name", [BASE_ID, "poet", f"{BASE_ID}:poet", "poet@latest"])
def test_a_model_is_shown_under_every_name_it_answers_to(client: openai.OpenAI, name: str) -> None:
    assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("model", [BASE_ID, "poet", "clerk", "linguist"])
def test_a_completion_is_what_the_engine_alone_answers(
    server: LocalServer, client: openai.OpenAI, model: str
) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt="the quick brown", max_tokens=12, **GREEDY
    )
    answer = raw.parse()
    assert answer.choices[0].text == expected_text(server, "the quick brown", model, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    version = version_of(server, model)
    assert raw.headers.get("x-adapter-version") == version
    assert raw.headers["x-replica-id"] == "replica-here"
    assert float(raw.headers["x-queue-time-ms"]) >= 0
    if version:
        assert raw.headers["x-adapter-tier"] in {"device", "host", "disk", "registry"}
    else:
        assert "x-adapter-tier" not in raw.headers


def test_adapters_change_answers(server: LocalServer) -> None:
    texts = {
        model: complete(server, model=model, max_tokens=12, ignore_eos=True).json()["choices"][0][
            "text"
        ]
        for model in (BASE_ID, "poet", "clerk", "linguist")
    }
    assert len(set(texts.values())) == 4


def test_a_chat_uses_the_models_template(server: LocalServer, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a few words"}]
    answer = client.chat.completions.create(
        model="poet", messages=messages, max_tokens=10, **GREEDY
    )
    template = "<|im_start|>user\na few words<|im_end|>\n<|im_start|>assistant\n"
    assert answer.choices[0].message.content == expected_text(server, template, "poet", 10)
    assert answer.choices[0].message.role == "assistant"


def test_a_chat_without_a_limit_may_fill_the_context(server: LocalServer) -> None:
    body = {"model": BASE_ID, "messages": [{"role": "user", "content": "a"}], "temperature": 0}
    answer = post(server, "/v1/chat/completions", **body, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == server.codec.context_tokens


def test_a_streamed_chat_has_role_deltas_reason_usage_and_done(
    server: LocalServer, client: openai.OpenAI
) -> None:
    messages: Any = [{"role": "user", "content": "a few words"}]
    options: dict[str, Any] = {"model": "clerk", "messages": messages, "max_tokens": 10, **GREEDY}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == whole.choices[0].message.content
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(each.usage is None for each in chunks[:-1])
    assert len({each.id for each in chunks}) == 1


def test_usage_tells_what_of_a_prompt_was_known_and_never_another_adapters(
    client: openai.OpenAI,
) -> None:
    prompt = "once told, a story need not be told again " * 3

    def cached(model: str) -> int:
        usage = client.completions.create(model=model, prompt=prompt, max_tokens=1).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens > 32
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached("poet"), cached("clerk"), cached(BASE_ID)] == [0, 0, 0]
    assert min(cached("poet"), cached("clerk"), cached(BASE_ID)) >= 16


def test_a_stream_is_server_sent_events_that_end_with_done(server: LocalServer) -> None:
    response = complete(server, model="poet", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter-version"] == version_of(server, "poet")
    lines = response.text.split("\n\n")
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert lines[-2:] == ["data: [DONE]", ""]


def test_several_prompts_have_one_choice_each_whole_and_streamed(
    server: LocalServer, client: openai.OpenAI
) -> None:
    prompts = ["the quick", "a few small", "user"]
    options: dict[str, Any] = {"model": "poet", "prompt": prompts, "max_tokens": 8, **GREEDY}
    expected = [expected_text(server, prompt, "poet", 8) for prompt in prompts]
    answer = client.completions.create(**options)
    assert [each.text for each in answer.choices] == expected
    texts = ["", "", ""]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_token_prompts_are_taken_as_they_are(server: LocalServer) -> None:
    tokens = server.codec.encode("the quick brown")
    by_text = complete(server, prompt="the quick brown").json()
    by_tokens = complete(server, prompt=[tokens, tokens]).json()
    assert {each["text"] for each in by_tokens["choices"]} == {by_text["choices"][0]["text"]}
    assert by_tokens["usage"]["prompt_tokens"] == 2 * len(tokens)


def test_a_stop_string_ends_the_answer_before_it_whole_and_streamed(server: LocalServer) -> None:
    full = complete(server, model="poet", max_tokens=20, ignore_eos=True).json()
    text = full["choices"][0]["text"]
    stop = text[5:8]
    expected = text[: text.index(stop)]
    answer = complete(server, model="poet", max_tokens=20, ignore_eos=True, stop=stop).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 20
    stream = server.openai.completions.create(
        model="poet", prompt="the", max_tokens=20, stop=["never", stop], stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_stop_tokens_end_the_answer_but_not_before_min_tokens(server: LocalServer) -> None:
    prompt = server.codec.encode("the")
    tokens = server.alone.answer(prompt, None, 12)
    options: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "stop_token_ids": [tokens[4]]}
    at = tokens.index(tokens[4])
    answer = complete(server, **options).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at
    later = complete(server, **options, min_tokens=12).json()
    assert later["usage"]["completion_tokens"] == 12


def test_the_same_seed_gives_the_same_sample_and_another_another(server: LocalServer) -> None:
    def sample(seed: int | None) -> str:
        fields = {"temperature": 1.5, "max_tokens": 16, "ignore_eos": True, "seed": seed}
        text: str = complete(server, **fields).json()["choices"][0]["text"]
        return text

    assert sample(7) == sample(7)
    assert len({sample(7), sample(8), sample(None), sample(None)}) == 4


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("nobody", "nobody"),
        (f"{BASE_ID}:nobody", "nobody"),
        ("poet@nobody", "nobody"),
        ("Not A Name", "Not A Name"),
        ("../etc", "../etc"),
        ("poet@" + "0" * 64, "0" * 64),
    ],
)
def test_an_unknown_model_is_a_404_that_names_it(
    server: LocalServer, model: str, named: str
) -> None:
    messages: Any = [{"role": "user", "content": "a"}]
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/chat/completions", {"messages": messages, "stream": True}),
    ):
        response = post(server, path, model=model, **prompt)
        assert response.status_code == 404
        error = response.json()["error"]
        assert error["param"] == "model" and error["code"] == "model_not_found"
        assert named in error["message"]
    with pytest.raises(openai.NotFoundError):
        server.openai.completions.create(model=model, prompt="a")


def test_an_adapter_answers_as_soon_as_it_is_published(server: LocalServer) -> None:
    assert complete(server, model="newcomer").status_code == 404
    version = server.world.publish("newcomer", rank=1, seed=9)
    until(lambda: complete(server, model="newcomer").status_code == 200)
    assert complete(server, model="newcomer").headers["x-adapter-version"] == version
    assert complete(server, model=f"newcomer@sha256:{version}").status_code == 200
    assert complete(server, model=f"newcomer@{version[:8]}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "a" * 3000}, "prompt", "context_length_exceeded"),
        ({"prompt": [1, 99999]}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": 2, "prompt": ["a"] * 65}, "n", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_field"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported_field"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "much"}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "invalid_value"),
        ({"min_tokens": 5}, "min_tokens", "invalid_value"),
        ({"no_such_field": 1}, "no_such_field", "unsupported_field"),
        (
            {"stream_options": {"unknown": 1}, "stream": True},
            "stream_options.unknown",
            "unsupported_field",
        ),
        ({"model": ""}, "model", "invalid_value"),
        ({"stop": ["a", 5]}, "stop.1", "invalid_value"),
        ({"model": f"{BASE_ID}@latest"}, "model", "invalid_value"),
        ({"model": "poet@"}, "model", "invalid_value"),
        ({"stream": True, "max_tokens": 600}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(
    server: LocalServer, fields: dict[str, Any], param: str, code: str
) -> None:
    response = complete(server, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "robot", "content": "a"}], "messages.0.role"),
        ([], "messages"),
        (
            [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}],
            "messages.0.content.0.type",
        ),
    ],
)
def test_a_bad_message_is_a_400_that_says_which(
    server: LocalServer, messages: Any, param: str
) -> None:
    response = post(server, "/v1/chat/completions", model=BASE_ID, messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    missing = post(server, "/v1/chat/completions", model=BASE_ID)
    assert missing.json()["error"]["param"] == "messages"


def test_errors_outside_the_schema_have_the_same_shape(server: LocalServer) -> None:
    broken = httpx.post(f"{server.url}/v1/completions", content=b"{not json")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_value")
    unknown = httpx.get(f"{server.url}/v1/nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    wrong = httpx.get(f"{server.url}/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert all(each.headers["x-request-id"] for each in (broken, unknown, wrong))


def test_a_body_that_is_too_large_is_a_413(server: LocalServer) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(5):
            yield b"a" * (1 << 20)

    for path in ("/v1/completions", "/v1/adapters"):
        headers = {"content-type": "application/json"}
        refused = httpx.post(f"{server.url}{path}", content=body(), headers=headers, timeout=60)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (413, "body_too_large"), path


def test_a_request_id_is_the_clients_or_a_new_one(server: LocalServer) -> None:
    named = httpx.get(f"{server.url}/version", headers={"x-request-id": "mine-7"})
    assert named.headers["x-request-id"] == "mine-7"
    first, second = (httpx.get(f"{server.url}/version") for _ in range(2))
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_two_requests_at_once_may_carry_the_same_request_id(server: LocalServer) -> None:
    codes = []

    def ask() -> None:
        body = {"model": BASE_ID, "prompt": "a", "max_tokens": 60, "ignore_eos": True}
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"x-request-id": "same"}, timeout=60
        )
        codes.append(answer.status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200, 200, 200]


def test_a_client_that_goes_away_frees_its_place(server: LocalServer) -> None:
    load = server.gateway.client.load
    before = load().tokens_out
    body = {"model": "poet", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    until(lambda: load().num_running == 0)
    assert load().tokens_out - before < 500


def test_health_says_whether_a_replica_answers(server: LocalServer) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.gateway.is_up = False
    try:
        response = httpx.get(f"{server.url}/health")
    finally:
        server.gateway.is_up = True
    assert response.status_code == 503
    assert response.headers["retry-after"] and response.json()["error"]["code"] == "overloaded"


def test_text_and_tokens_go_both_ways(server: LocalServer) -> None:
    answer = post(server, "/tokenize", prompt="the quick fox").json()
    assert answer["count"] == len(answer["tokens"])
    back = post(server, "/detokenize", tokens=answer["tokens"]).json()
    assert back == {"prompt": "the quick fox"}
    chat = post(server, "/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert "<|im_start|>user" in post(server, "/detokenize", tokens=chat["tokens"]).json()["prompt"]
    assert post(server, "/tokenize").status_code == 400
    assert post(server, "/detokenize", tokens=[99999]).json()["error"]["param"] == "tokens"


def test_adapters_are_listed_with_versions_and_aliases(server: LocalServer) -> None:
    data = httpx.get(f"{server.url}/v1/adapters").json()["data"]
    poet = next(each for each in data if each["id"] == "poet")
    version = version_of(server, "poet")
    assert poet["aliases"] == {"latest": version} == poet["serving"]
    assert poet["versions"][0]["version"] == version
    assert poet["versions"][0]["rank"] == 2


def test_the_docs_show_every_route_and_an_example_of_every_body(server: LocalServer) -> None:
    assert "swagger" in httpx.get(f"{server.url}/docs").text
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert set(schema["paths"]) >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/versions/{version}",
        "/v1/adapters/{name}/aliases/{alias}",
        "/v1/adapters/{name}/pin",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/cluster",
        "/health",
        "/metrics",
        "/version",
        "/tokenize",
        "/detokenize",
    }
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                name = body["schema"].get("$ref", "").rpartition("/")[2]
                shown = body.get("example") or schema["components"]["schemas"][name]["example"]
                assert shown, (method, path)
    assert schema["components"]["securitySchemes"]


def test_the_version_is_the_projects(server: LocalServer) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert httpx.get(f"{server.url}/version").json() == {"version": project["version"]}
