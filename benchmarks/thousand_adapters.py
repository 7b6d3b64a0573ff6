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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import httpx
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig

from benchmarks.adapter_traffic import SEED, Plan, Side, Traffic, p99
from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.population import publish_on_all_cores
from benchmarks.results_file import Row, print_rows, write_result
from benchmarks.s3_process import BUCKET, CREDENTIALS, S3Process, s3_process
from benchmarks.stream_client import Streamed
from benchmarks.workload import Zipf
from cli.local_cluster import start_cluster
from cli.serving import deploy_on, logical_cpus
from deployments.settings import Settings
from storage.config import StorageSettings
from workers.config import EngineSettings

Figures = dict[tuple[str, str], float]

CLAIM = (
    "Two replicas with room for 64 adapters each serve a thousand on S3: nobody starves, and loads cost warm rows "
    "at most a tenth of the time between tokens."
)
LOAD_BAR = 1.10
P99_WAIT_BAR_S = 3.0
LONGEST_WAIT_BAR_S = 10.0
QUICK = Plan(adapters=300, requests=200, warm_up_requests=50, side_s=4.0)


def waiting_rows(answers: Sequence[Streamed]) -> list[Row]:
    whole = [one for one in answers if one.is_whole]
    waits = [one.first_token_s for one in whole]
    tiers = Counter(one.tier for one in whole)
    rows = [
        Row("p99 of all waits, s", (p99(waits),), P99_WAIT_BAR_S, "lower"),
        Row("the longest wait, s", (max(waits),), LONGEST_WAIT_BAR_S, "lower"),
    ]
    for tier in ("device", "host", "disk", "registry"):
        those = [one for one in whole if one.tier == tier]
        rows.append(Row(f"{tier}: share of requests", (tiers[tier] / len(whole),)))
        if len(those) < 2:
            continue
        rows += [
            Row(f"{tier}: first token, median s", (median(x.first_token_s for x in those),)),
            Row(f"{tier}: first token, p99 s", (p99([x.first_token_s for x in those]),)),
            Row(f"{tier}: waiting in the replica, median s", (median(x.queue_s for x in those),)),
            Row(f"{tier}: waiting in the replica, p99 s", (p99([x.queue_s for x in those]),)),
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


def figures(url: str) -> Figures:
    """The server's own figures that have at most one label, by name and that label's value."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    return {
        (one.name, "".join(one.labels.values())): one.value
        for one in samples
        if len(one.labels) < 2
    }


def load_rows(grown: Figures, misses: int, s3_cpu_s: float) -> list[Row]:
    """Where the time of loads went, by the server's own word."""
    loads = grown["flora_adapter_loads_total", ""]
    waited_s = grown["flora_step_load_wait_seconds_total", ""]
    stage = "flora_adapter_load_stage_seconds"
    means = {
        name: 1000 * grown[f"{stage}_sum", name] / count
        for (each, name), count in grown.items()
        if each == f"{stage}_count" and count
    }
    return [
        Row("loads for each arrival that missed", (loads / misses,)),
        Row("ms that steps waited for loads, for each load", (1000 * waited_s / loads,)),
        Row("CPU ms of the S3 server, for each load", (1000 * s3_cpu_s / loads,)),
        *(Row(f"a load: {name}, mean ms", (mean,)) for name, mean in sorted(means.items())),
    ]


async def measure(
    url: str, names: Sequence[str], plan: Plan, rounds: int, s3: S3Process
) -> list[Row]:
    traffic = Traffic(url, names, plan)
    answers = await traffic.waiting()
    before, cpu_s = figures(url), s3.cpu_s
    taken = await traffic.loads_cost(rounds)
    after, cpu_s = figures(url), s3.cpu_s - cpu_s
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    misses = (rounds + 1) * plan.arrivals_of_a_side
    return [
        Row("requests that failed", (float(len(traffic.failures)),), 0.0, "lower"),
        *waiting_rows(answers),
        *cost_rows(taken),
        *load_rows(grown, misses, cpu_s),
    ]


def main() -> None:
    parser = parser_of(__doc__, rounds=6)
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
