"""A thousand adapters on S3, two replicas with room for 64 each, Zipf's law over HTTP: who waits, and who pays.

FLoRA adapters of rank 1 are published to a real S3 API (moto's server, a process of its own) and served by two
replicas on a private Ray, through ingress, router and placement as `flora up` makes them. Two experiments:

1. **Waiting.** Clients in a closed loop ask for adapters drawn by Zipf's law, streaming. Where the adapter was found is
   the response's `x-adapter-tier`. A wait is from sending to the first token. Nobody may fail or starve: the 99th
   percentile of waits and the longest one have bars.
2. **What loads cost others.** Warm clients stream answers of a few resident adapters. Beside them short requests arrive
   at a fixed rate; by turns they ask for adapters that are resident and for adapters nobody asked for before, so on
   both sides they compute the same tokens, and on one side each needs a load from S3. The ratio of the warm streams'
   time between tokens is what loads cost.

Expected before the first run: 60 % to 70 % of the requests find their adapter on the device (the 128 most popular of
a thousand get 73 %); a load from S3 takes 0.1 s to 0.3 s on busy cores, so p99 of all waits is under 1.5 s and the
longest under 5 s, when the rule against starvation would step in; four loads a second cost about 20 ms of CPU each, of
two cores 4 %, so a ratio of 1.05.

    python -m benchmarks.thousand_adapters --base ~/.flora/bases/smollm2-135m-instruct

The S3 server, the clients, Ray and both replicas share this machine's cores.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, cycle, pairwise
from pathlib import Path
from statistics import median, quantiles

import httpx
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig

from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.population import publish_on_all_cores
from benchmarks.results_file import Row, print_rows, write_result
from benchmarks.s3_process import BUCKET, CREDENTIALS, S3Process, s3_process
from benchmarks.stream_client import Streamed, stream
from benchmarks.workload import Batch, Zipf
from cli.local_cluster import start_cluster
from cli.serving import deploy_on, logical_cpus
from deployments.settings import Settings
from storage.config import StorageSettings
from workers.config import EngineSettings

CLAIM = (
    "Two replicas with room for 64 adapters each serve a thousand on S3: nobody starves, and loads cost warm rows "
    "at most a tenth of the time between tokens."
)
SEED = 0
LOAD_BAR = 1.10
P99_WAIT_BAR_S = 3.0
LONGEST_WAIT_BAR_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of both experiments."""

    adapters: int = 1000
    room: int = 64  # adapters of rank 1 on each of two replicas
    sequences: int = 8  # that each replica runs at once
    # Waiting.
    clients: int = 16
    requests: int = 1000
    warm_up_requests: int = 200
    prompt_tokens: int = 32
    vocabulary: int = 40_000  # or the base's, if that has fewer tokens
    answer_tokens: int = 24
    # What loads cost others.
    warm_clients: int = 8
    warm_adapters: int = 8
    warm_answer_tokens: int = 48
    hit_adapters: int = 16
    arrivals_per_s: float = 4.0
    arrival_tokens: int = 2
    side_s: float = 10.0


QUICK = Plan(adapters=300, requests=200, warm_up_requests=50, side_s=4.0)


class Bench:
    """Both experiments against a running application.

    Args:
        names: of the adapters, the most popular first.
    """

    def __init__(self, url: str, names: Sequence[str], plan: Plan) -> None:
        self._url = f"{url}/v1/completions"
        self._names = list(names)
        self._plan = plan
        self._asked: set[str] = set()
        self._prompts = _prompts(plan.prompt_tokens, plan.vocabulary)
        self.failures: list[Streamed] = []

    async def waiting(self) -> list[Streamed]:
        """The answers of the closed loop, those of its warm-up left out."""
        plan = self._plan
        total = plan.warm_up_requests + plan.requests
        drawn = Zipf(plan.adapters).draw(total, SEED)
        order = iter(drawn)
        answers: list[Streamed] = []

        async def client() -> None:
            for index in order:
                answers.append(await self._ask(self._names[index], plan.answer_tokens))

        await asyncio.gather(*(client() for _ in range(plan.clients)))
        return answers[plan.warm_up_requests :]

    async def loads_cost(self, rounds: int) -> list[tuple[Side, Side]]:
        """(hits, misses) of each round; the sides take turns, and so does who begins."""
        plan = self._plan
        hot = self._names[: plan.warm_adapters]
        hits = self._names[plan.warm_adapters :][: plan.hit_adapters]
        untouched = iter([name for name in self._names if name not in self._asked])
        warm: list[Streamed] = []
        is_over = asyncio.Event()

        async def keep_streaming(name: str) -> None:
            while not is_over.is_set():
                warm.append(await self._ask(name, plan.warm_answer_tokens))

        taken = []
        async with asyncio.TaskGroup() as clients:
            for number in range(plan.warm_clients):
                clients.create_task(keep_streaming(hot[number % len(hot)]))
            for number in range(-1, rounds):  # the first one warms up
                found: dict[bool, Window] = {}
                for is_miss in (number % 2 == 0, number % 2 != 0):
                    await asyncio.gather(*(self._ask(name, 1) for name in hits))
                    found[is_miss] = await self._window(untouched if is_miss else cycle(hits))
                    print(f"round {number}  {_told(found[is_miss])}", flush=True)
                taken.append((found[False], found[True]))
            is_over.set()
        whole = [one for one in warm if one.is_whole]
        return [(Side.of(hit, whole), Side.of(miss, whole)) for hit, miss in taken[1:]]

    async def _window(self, names: Iterator[str]) -> Window:
        """Requests for `names` at a fixed rate."""
        plan = self._plan
        began_s = time.perf_counter()
        arrivals = []
        for number in range(int(plan.side_s * plan.arrivals_per_s)):
            await asyncio.sleep(began_s + number / plan.arrivals_per_s - time.perf_counter())
            arrivals.append(asyncio.create_task(self._ask(next(names), plan.arrival_tokens)))
        await asyncio.sleep(began_s + plan.side_s - time.perf_counter())
        ended_s = time.perf_counter()
        answers = await asyncio.gather(*arrivals)
        return Window(began_s, ended_s, tuple(one for one in answers if one.is_whole))

    async def _ask(self, name: str, answer_tokens: int) -> Streamed:
        self._asked.add(name)
        answer = await stream(self._url, name, next(self._prompts), answer_tokens)
        if not answer.is_whole:
            self.failures.append(answer)
            print(f"{name}: {answer.error}", flush=True)
        return answer


@dataclass(frozen=True, slots=True)
class Window:
    """When one side of a round was, and its arrivals."""

    began_s: float
    ended_s: float
    arrivals: tuple[Streamed, ...]

    @property
    def on_device(self) -> float:
        """The share of arrivals that found their adapter on the device."""
        return sum(one.tier == "device" for one in self.arrivals) / len(self.arrivals)


@dataclass(frozen=True, slots=True)
class Side:
    """What warm streams did during one side of a round."""

    on_device: float  # share of the arrivals
    inter_token_s: float
    p99_pause_s: float

    @classmethod
    def of(cls, window: Window, warm: Sequence[Streamed]) -> Side:
        seconds = tokens = 0.0
        pauses: list[float] = []
        for one in warm:
            inside = [at_s for at_s in one.event_s if window.began_s <= at_s <= window.ended_s]
            if len(inside) < 2:
                continue
            seconds += inside[-1] - inside[0]
            # An event may bring several tokens, or none that is a character yet.
            tokens += (len(inside) - 1) * (one.tokens - 1) / (len(one.event_s) - 1)
            pauses += [after - before for before, after in pairwise(inside)]
        return cls(window.on_device, seconds / tokens, _p99(pauses))


def _told(window: Window) -> str:
    waits = [one.first_token_s for one in window.arrivals]
    return (
        f"{len(waits)} arrivals, {window.on_device:.0%} on the device, "
        f"first token after {median(waits):.2f} s, the latest after {max(waits):.2f} s"
    )


def waiting_rows(answers: Sequence[Streamed]) -> list[Row]:
    whole = [one for one in answers if one.is_whole]
    waits = [one.first_token_s for one in whole]
    tiers = Counter(one.tier for one in whole)
    rows = [
        Row("p99 of all waits, s", (_p99(waits),), P99_WAIT_BAR_S, "lower"),
        Row("the longest wait, s", (max(waits),), LONGEST_WAIT_BAR_S, "lower"),
    ]
    for tier in ("device", "host", "disk", "registry"):
        those = [one for one in whole if one.tier == tier]
        rows.append(Row(f"{tier}: share of requests", (tiers[tier] / len(whole),)))
        if len(those) < 2:
            continue
        rows += [
            Row(f"{tier}: first token, median s", (median(x.first_token_s for x in those),)),
            Row(f"{tier}: first token, p99 s", (_p99([x.first_token_s for x in those]),)),
            Row(f"{tier}: waiting in the replica, median s", (median(x.queue_s for x in those),)),
            Row(f"{tier}: waiting in the replica, p99 s", (_p99([x.queue_s for x in those]),)),
        ]
    return rows


def cost_rows(taken: Sequence[tuple[Side, Side]]) -> list[Row]:
    def told(name: str, figures: Iterator[float]) -> Row:
        return Row(name, tuple(figures), None, "lower")

    return [
        Row(
            "time between tokens of warm rows: beside loads / beside hits",
            tuple(misses.inter_token_s / hits.inter_token_s for hits, misses in taken),
            LOAD_BAR,
            "lower",
        ),
        told("beside hits, ms between tokens", (1000 * hits.inter_token_s for hits, _ in taken)),
        told("beside loads, ms between tokens", (1000 * miss.inter_token_s for _, miss in taken)),
        told("beside hits, p99 ms of a pause", (1000 * hits.p99_pause_s for hits, _ in taken)),
        told("beside loads, p99 ms of a pause", (1000 * miss.p99_pause_s for _, miss in taken)),
        told("hits that needed a load, share", (1 - hits.on_device for hits, _ in taken)),
        told("misses that needed none, share", (miss.on_device for _, miss in taken)),
    ]


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def _prompts(tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Other prompts all the time, so that no cache of prefixes helps anybody."""
    batch = Batch(requests=256, prompt_tokens=tokens, vocabulary=vocabulary)
    for seed in count(SEED):
        yield from batch.prompts(seed)


def sized(base: Path, directory: Path, s3_url: str, plan: Plan, engine: EngineSettings) -> Settings:
    """Two replicas of one thread each, with room for so many adapters of rank 1."""
    return Settings(
        storage=StorageSettings(
            registry=f"s3://{BUCKET}/registry",
            s3_endpoint_url=s3_url,
            cache_dir=directory / "cache",
        ),
        engine=engine.model_copy(
            update={
                "base": str(base.absolute()),
                "base_id": base.name.lower(),
                "threads": 1,
                "max_sequences": plan.sequences,
                "max_sequence_tokens": plan.prompt_tokens + plan.warm_answer_tokens,
                "bank_rows": plan.room,
                "bank_slots": plan.room,
            }
        ),
        serve={  # type: ignore[arg-type]
            "allow_anonymous": True,
            "port": 0,
            "min_replicas": 2,
            "max_replicas": 2,
        },
    )


def figures(url: str) -> dict[str, float]:
    """The server's own counters, of all labels together."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def measure(
    url: str, names: Sequence[str], plan: Plan, rounds: int, s3: S3Process
) -> list[Row]:
    bench = Bench(url, names, plan)
    answers = await bench.waiting()
    before, cpu_s = figures(url), s3.cpu_s
    taken = await bench.loads_cost(rounds)
    after, cpu_s = figures(url), s3.cpu_s - cpu_s
    loads = after["flora_adapter_loads_total"] - before["flora_adapter_loads_total"]
    return [
        Row("requests that failed", (float(len(bench.failures)),), 0.0, "lower"),
        *waiting_rows(answers),
        *cost_rows(taken),
        Row("ms that steps waited for loads, per load", (_wait_ms(before, after) / loads,)),
        Row("CPU ms of the S3 server, per load", (1000 * cpu_s / loads,)),
    ]


def _wait_ms(before: dict[str, float], after: dict[str, float]) -> float:
    name = "flora_step_load_wait_seconds_total"
    return 1000 * (after[name] - before[name])


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    add_runner(parser)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    arguments = parse(parser)
    plan = QUICK if arguments.quick else Plan()
    config = AutoConfig.from_pretrained(arguments.base)
    plan = replace(plan, vocabulary=min(plan.vocabulary, config.vocab_size))
    with tempfile.TemporaryDirectory() as directory, s3_process() as s3:
        settings = sized(arguments.base, Path(directory), s3.url, plan, engine_settings(arguments))
        names = [f"adapter-{index}" for index in range(plan.adapters)]
        publish_on_all_cores(settings.storage, arguments.base, names, SEED)
        cluster = start_cluster(num_cpus=logical_cpus(settings), variables=CREDENTIALS)
        try:
            url = deploy_on(cluster, settings, report=print)
            rows = asyncio.run(measure(url, names, plan, arguments.rounds, s3))
        finally:
            cluster.stop()
    print_rows(rows)
    workload = {**asdict(plan), "zipf": Zipf(plan.adapters).as_dict(), "cpus": os.cpu_count()}
    path = write_result("thousand_adapters", CLAIM, rows, seed=SEED, workload=workload)
    print("wrote", path.name)


if __name__ == "__main__":
    main()
