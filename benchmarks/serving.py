"""What HTTP, Ray Serve and the way to the replica cost: requests over HTTP beside the same engine in this process.

32 requests at a time for the base model, 64 prompt and 64 answer tokens, greedy. Three sides take turns: the engine
behind its client in this process; the application on a private Ray (ingress, router, one replica) with whole
responses; the same with streamed ones, an event per token. Both engines have the same settings, threads and cores;
while one answers, the other sleeps. The HTTP client runs on the same cores, and reads bytes without looking at them.

    python -m benchmarks.serving --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.http_client import post_all
from benchmarks.own_engine import Answered
from benchmarks.results_file import Row, Side, own_side, print_rows, write_result
from benchmarks.workload import Batch
from cli.local_cluster import start_cluster
from cli.serving import deploy_on, logical_cpus
from deployments.settings import Settings
from storage.adapter_cache import AdapterCache
from storage.config import StorageSettings
from workers.config import EngineSettings
from workers.engine.building import build_client
from workers.engine.request import EngineRequest, RequestOutput, SamplingParams, StepOutputs

CLAIM = "A request over HTTP and Ray Serve is nearly as fast as one to the engine itself."
SEED = 0
IN_PROCESS, WHOLE, STREAMED = "in process", "whole responses", "streamed"
BARS = {WHOLE: 0.85, STREAMED: 0.70}
_ANSWER_WITHIN_S = 600.0

Run = Callable[[Sequence[Sequence[int]], int], Answered]


class InProcess:
    """An engine behind its client, as a replica has it."""

    def __init__(self, settings: Settings) -> None:
        self._client = build_client(settings.engine, partial(AdapterCache.open, settings.storage))
        self._changed = threading.Condition()
        self._answers: dict[str, list[int]] = {}
        self._left: set[str] = set()
        self._error: Exception | None = None
        self._batches = 0
        self._client.start(self._on_step)

    def run(self, prompts: Sequence[Sequence[int]], answer_tokens: int) -> Answered:
        """Raises the error of a request that failed, TimeoutError when nothing comes for ten minutes."""
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        self._batches += 1
        requests = [
            EngineRequest(f"{self._batches}-{number}", tuple(prompt), sampling)
            for number, prompt in enumerate(prompts)
        ]
        self._answers = {request.request_id: [] for request in requests}
        self._left = set(self._answers)
        began = time.perf_counter()
        for request in requests:
            self._client.submit(request)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._left or self._error, _ANSWER_WITHIN_S):
                raise TimeoutError("the engine does not answer")
        seconds = time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return Answered(seconds, tuple(map(tuple, self._answers.values())))

    def close(self) -> None:
        self._client.stop()

    def _on_step(self, outputs: StepOutputs) -> None:
        for output in outputs.outputs:
            self._take(output)

    def _take(self, output: RequestOutput) -> None:
        self._answers[output.request_id] += output.new_token_ids
        if output.finish_reason is None:
            return
        with self._changed:
            self._error = self._error or output.error
            self._left.discard(output.request_id)
            self._changed.notify()


def http_side(url: str, model: str, *, stream: bool) -> Run:
    """Completions of token prompts, one request each. Raises RuntimeError unless every answer has all its tokens."""

    def run(prompts: Sequence[Sequence[int]], answer_tokens: int) -> Answered:
        fields: dict[str, Any] = {
            "model": model,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        seconds, texts = post_all(
            f"{url}/v1/completions", [{**fields, "prompt": list(prompt)} for prompt in prompts]
        )
        for text in texts:
            _check(text, stream, answer_tokens)
        return Answered(seconds, ((0,) * answer_tokens,) * len(prompts))

    return run


def _check(text: str, stream: bool, answer_tokens: int) -> None:
    events = [text]
    if stream:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line[:1] == "d"]
        if events.pop() != "[DONE]":
            raise RuntimeError("a stream did not end")
    usage = json.loads(events[-1])["usage"]
    if usage["completion_tokens"] != answer_tokens:
        raise RuntimeError(
            f"an answer has {usage['completion_tokens']} tokens instead of {answer_tokens}"
        )


def compare(url: str, settings: Settings, rounds: int, batch: Batch) -> list[Row]:
    """The rows, from an application that runs at `url` with these settings and an engine of our own."""
    engine = InProcess(settings)
    try:
        sides: dict[str, Run] = {
            IN_PROCESS: engine.run,
            WHOLE: http_side(url, settings.engine.base_id, stream=False),
            STREAMED: http_side(url, settings.engine.base_id, stream=True),
        }
        names = list(sides)
        speed: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-1, rounds):  # the first one warms up
            first = number % len(names)
            for turn, name in enumerate(names[first:] + names[:first]):
                # Two sides share a replica: other prompts, or the second would find the first's in its cache.
                prompts = batch.prompts(SEED + (number + 1) * len(names) + turn)
                tokens = batch.warm_up_tokens if number < 0 else batch.answer_tokens
                answered = sides[name](prompts, tokens)
                if number >= 0:
                    speed[name].append(answered.tokens_per_s)
                    print(f"round {number}  {name:<16} {speed[name][-1]:7.1f} tokens/s", flush=True)
    finally:
        engine.close()
    rows = [
        Row(
            f"over HTTP, {name} / the same engine in process",
            tuple(a / b for a, b in zip(speed[name], speed[IN_PROCESS], strict=True)),
            bar,
        )
        for name, bar in BARS.items()
    ]
    return rows + [Row(f"{name}, tokens per second", tuple(speed[name])) for name in names]


def replica_side(url: str, head_pid: int) -> Side:
    """What the one replica computes with, as it reports itself and as the system knows its process.

    Raises:
        RuntimeError: there is not exactly one.
    """
    [report] = httpx.get(f"{url}/v1/cluster", timeout=30).json()["replicas"]
    replicas = []
    for one in psutil.Process(head_pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            if any("ServeReplica:" in word and ":Engine" in word for word in one.cmdline()):
                replicas.append(one)
    if len(replicas) != 1:
        raise RuntimeError(f"{len(replicas)} processes look like the replica's")
    return Side("replica", report["threads"], tuple(sorted(replicas[0].cpu_affinity() or ())))


def sized(base: Path, directory: Path, batch: Batch, engine: EngineSettings) -> Settings:
    """Settings of both sides: one replica on all of this process's threads."""
    return Settings(
        storage=StorageSettings(
            registry=str(directory / "registry"), cache_dir=directory / "cache"
        ),
        engine=engine.model_copy(
            update={
                "base": str(base.absolute()),
                "base_id": base.name.lower(),
                "threads": torch.get_num_threads(),
                "max_sequences": batch.requests,
                "max_sequence_tokens": batch.prompt_tokens + batch.answer_tokens,
            }
        ),
        serve={"allow_anonymous": True, "port": 0},  # type: ignore[arg-type]
    )


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    add_runner(parser)
    parser.add_argument("--requests", type=int, default=Batch().requests)
    parser.add_argument("--answer-tokens", type=int, default=Batch().answer_tokens)
    arguments = parse(parser)
    batch = Batch(requests=arguments.requests, answer_tokens=arguments.answer_tokens)
    with tempfile.TemporaryDirectory() as directory:
        settings = sized(arguments.base, Path(directory), batch, engine_settings(arguments))
        cluster = start_cluster(num_cpus=logical_cpus(settings))
        try:
            url = deploy_on(cluster, settings, report=print)
            rows = compare(url, settings, arguments.rounds, batch)
            sides = [own_side(IN_PROCESS), replica_side(url, cluster.pid)]
        finally:
            cluster.stop()
    print_rows(rows)
    path = write_result(
        "serving",
        CLAIM,
        rows,
        seed=SEED,
        workload={**batch.as_dict(), "runner": arguments.runner},
        sides=sides,
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
