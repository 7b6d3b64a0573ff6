"""Replicas come with load and go without it, on a real Ray: no request fails, no answer is wrong, no stream is cut."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import httpx
import pytest
import torch

from cli.local_cluster import LocalCluster
from cluster.config import AutoscalingSettings
from deployments.launching import deploy, undeploy
from deployments.text import TextCodec
from storage.identity import AdapterVersion
from tests.deployments.world import BASE_ID, LoneEngine, World, settings_for

STREAM_TOKENS = int(os.environ.get("FLORA_TEST_STREAM_TOKENS", "400"))
"""Of the streams that must survive; 1,500 take longer than 20 seconds anywhere."""
TOKENS = 24  # of the others
STREAMED = "streamed: "
LAYERS = 24
"""Many small layers: an answer takes long, and hardly any memory."""
PROMPTS = ["the quick brown", "a few small words", "lazy dog jumps"]
MOST = 2
MAX_STREAMS = 6

QUICK = AutoscalingSettings(
    queue_s=0.5,
    first_token_s=60.0,  # of the last minute, in which there was a crowd
    up_delay_s=1.0,
    down_delay_s=2.0,
    settle_s=5.0,
    report_s=0.5,
    stale_after_s=5.0,
)


@dataclass
class Stream:
    """A stream under way: who answers it is known with its first token, and when it ended with its last."""

    has_begun: threading.Event = field(default_factory=threading.Event)
    replica: str = ""
    ended_s: float = 0.0


@dataclass
class Scaled:
    """An application of one to two replicas, and what its answers must be."""

    client: httpx.Client
    expected: dict[tuple[str, str], str]
    versions: dict[str, AdapterVersion | None]
    failures: list[str] = field(default_factory=list)

    def ask(self, model: str, prompt: str) -> str:
        """The id of the replica that answered; whatever was not right is in `failures`."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        response = self.client.post("/v1/completions", json={**body, "ignore_eos": True})
        self._check(response, model, prompt)
        return response.headers.get("x-replica-id", "")

    def replicas(self) -> set[str]:
        """Those that requests are routed to."""
        state = self.client.get("/v1/cluster").json()
        return {replica["id"] for replica in state["replicas"]}

    def read(self, stream: Stream, model: str, prompt: str) -> None:
        text, end = "", ""
        body = {"model": model, "prompt": prompt, "max_tokens": STREAM_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            stream.replica = response.headers.get("x-replica-id", "")
            stream.has_begun.set()
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data.startswith("{"):
                    event = httpx.Response(200, text=data).json()
                    text += event["choices"][0]["text"] if "choices" in event else ""
                    end = data if "error" in event else end
                elif data == "[DONE]":
                    end = "whole"
        if end != "whole" or text != self.expected[model, STREAMED + prompt]:
            self.failures.append(f"a stream of {model}: {end or 'cut off'}")
        stream.ended_s = time.monotonic()

    def _check(self, response: httpx.Response, model: str, prompt: str) -> None:
        if response.status_code != 200:
            self.failures.append(f"{model}: {response.status_code} {response.text}")
        elif response.headers.get("x-adapter-version") != self.versions[model]:
            self.failures.append(f"{model}: another version")
        elif (text := response.json()["choices"][0]["text"]) != self.expected[model, prompt]:
            self.failures.append(f"{model}: {text!r} is not {self.expected[model, prompt]!r}")


@pytest.fixture(scope="module")
def scaled(
    ray_session: LocalCluster, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scaled]:
    base = slow_model(tiny_llama_dir, tmp_path_factory.mktemp("slow") / "slow-llama")
    settings = settings_for(
        base, tmp_path_factory.mktemp("scaled"), max_replicas=MOST, cpus_per_replica=0.5
    )
    engine = settings.engine.model_copy(update={"max_sequence_tokens": 2048})
    cluster = settings.cluster.model_copy(update={"tick_s": 0.5})
    settings = settings.model_copy(
        update={"autoscaling": QUICK, "engine": engine, "cluster": cluster}
    )
    world = World.create(base, settings)
    versions: dict[str, AdapterVersion | None] = {BASE_ID: None}
    for seed, name in enumerate(("one", "two")):
        versions[name] = world.publish(name, rank=1, seed=seed)
    codec, alone = TextCodec.open(settings.engine), LoneEngine(world)

    def answer(model: str, prompt: str, tokens: int) -> str:
        return codec.decode(alone.answer(codec.encode(prompt), versions[model], tokens))

    expected = {
        (model, prompt): answer(model, prompt, TOKENS) for model in versions for prompt in PROMPTS
    }
    expected[BASE_ID, STREAMED + PROMPTS[0]] = answer(BASE_ID, PROMPTS[0], STREAM_TOKENS)
    alone.client.stop()
    try:
        with httpx.Client(base_url=deploy(settings), timeout=300) as client:
            yield Scaled(client, expected, versions)
    finally:
        undeploy()


def slow_model(tiny: Path, directory: Path) -> Path:
    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(tiny, directory)
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.max_position_embeddings = LAYERS, 2048
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def test_replicas_come_with_load_and_go_without_it_and_nobody_notices(scaled: Scaled) -> None:
    everything = [(model, prompt) for model in scaled.versions for prompt in PROMPTS]
    for each in everything:
        scaled.ask(*each)
    assert scaled.failures == []
    assert len(scaled.replicas()) == 1

    # More than one replica's room is asked for, until both answer.
    with ThreadPoolExecutor(20) as pool:
        seen: set[str] = set()
        deadline_s = time.monotonic() + 120
        many = cycle(everything)
        asked: list[Future[str]] = []
        while len(seen) < MOST:
            assert time.monotonic() < deadline_s, "no second replica answered"
            answered = [one for one in asked if one.done()]
            seen.update(one.result() for one in answered)
            asked = [one for one in asked if one not in answered]
            asked += [pool.submit(scaled.ask, *next(many)) for _ in range(20 - len(asked))]
            time.sleep(0.05)
    assert scaled.failures == []

    # Always a long stream on each of them, a little traffic beside, and one of the two must go.
    with ThreadPoolExecutor(MAX_STREAMS) as pool:
        streams: list[Stream] = []
        reads: list[Future[None]] = []
        stays, left_s = seen, 0.0
        for each in cycle(everything):
            busy = {stream.replica for stream in streams if not stream.ended_s}
            if len(stays) == MOST and busy != seen:
                streams.append(Stream())
                reads.append(pool.submit(scaled.read, streams[-1], BASE_ID, PROMPTS[0]))
                assert streams[-1].has_begun.wait(60)
            scaled.ask(*each)
            if len(stays) == MOST:
                stays, left_s = scaled.replicas(), time.monotonic()
            if len(stays) < MOST and all(one.done() for one in reads):
                break
            assert time.monotonic() < deadline_s + 120, "no replica left"
        for one in reads:
            one.result()
    (leaver,) = seen - stays
    went_on_s = max(one.ended_s for one in streams if one.replica == leaver) - left_s
    assert went_on_s > 0, "its streams had ended before it left"
    print(f"a stream went on for {went_on_s:.1f} s on the replica that was leaving")

    for each in everything:
        assert scaled.ask(*each) in stays
    assert scaled.failures == []
