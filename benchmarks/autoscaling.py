"""`flora up --replicas 1..4` under a crowd and after it: replicas come, replicas go, and nobody's request fails.

Runs the command itself, in a home of its own. A crowd of clients asks in a closed loop until four replicas serve; then
it goes away, one client stays, and two long streams for each replica begin, which must end whole although all replicas
but one leave under them. Delays are shorter than the defaults, so that it takes minutes and not a quarter of an hour.

Expected before the first run: four replicas within 90 s of the crowd's coming (a replica takes 10 s to 20 s to start
beside a crowd on the same cores, and one or two are added at a time), one of them within 60 s of its going, no failed
request, and streams that go on for longer than 20 s on replicas that were told to leave.

    python -m benchmarks.autoscaling --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from benchmarks.results_file import Row, print_rows, write_result
from benchmarks.stream_client import Streamed, stream

CLAIM = "Replicas come with load and go after it, and no request fails for either."
MOST = 4
CLIENTS = 64
CROWD_TOKENS = 32
STREAM_TOKENS = 1500
PROMPT = list(range(100, 116))
UP_WITHIN_S = 300.0
DOWN_WITHIN_S = 600.0
STREAM_WITHIN_S = 600.0
LONG_STREAM_S = 20.0
STEADY_S = 3.0
"""For so long there are as many as were waited for: on a busy machine a replica may miss a few heartbeats."""
UP_BAR_S, DOWN_BAR_S = 90.0, 60.0
SETTINGS = {
    "engine": {"max_sequences": 16, "max_sequence_tokens": 2048},
    "serve": {"cpus_per_replica": 0.25},
    "autoscaling": {
        "queue_s": 0.5,
        "first_token_s": 120.0,
        "up_delay_s": 1.0,
        "down_delay_s": 5.0,
        "settle_s": 10.0,
    },
}


@dataclass
class Watch:
    """Who answered, and which replicas served when."""

    url: str
    model: str
    answers: list[Streamed] = field(default_factory=list)
    serving: frozenset[str] = frozenset()
    left_s: dict[str, float] = field(default_factory=dict)
    has_crowd: bool = True
    is_over: bool = False

    async def ask(self, is_crowd: bool) -> None:
        """One client's closed loop."""
        while not self.is_over and (self.has_crowd or not is_crowd):
            self.answers.append(
                await stream(self._completions, self.model, PROMPT, CROWD_TOKENS, STREAM_WITHIN_S)
            )

    async def hold(self) -> Streamed:
        """One long stream."""
        answer = await stream(self._completions, self.model, PROMPT, STREAM_TOKENS, STREAM_WITHIN_S)
        self.answers.append(answer)
        return answer

    async def until(self, count: int, within_s: float) -> float:
        """Seconds until so many replicas serve, and go on to. Raises TimeoutError."""
        began_s = since_s = time.perf_counter()
        async with asyncio.timeout(within_s), httpx.AsyncClient(timeout=60) as client:
            while True:
                state = (await client.get(f"{self.url}/v1/cluster")).json()
                serving = frozenset(replica["id"] for replica in state["replicas"])
                now_s = time.perf_counter()
                if serving != self.serving:
                    print(f"{now_s - began_s:6.1f} s  {len(serving)} serve", flush=True)
                    self.left_s |= dict.fromkeys(self.serving - serving, now_s)
                    for back in serving & self.left_s.keys():
                        del self.left_s[back]
                    self.serving, since_s = serving, now_s
                if len(serving) == count and now_s - since_s >= STEADY_S:
                    return since_s - began_s
                await asyncio.sleep(0.5)

    @property
    def _completions(self) -> str:
        return f"{self.url}/v1/completions"


async def measure(url: str, model: str) -> list[Row]:
    """Needs a service of one to `MOST` replicas, of which one serves."""
    watch = Watch(url, model)
    await watch.until(1, UP_WITHIN_S)
    clients = [asyncio.create_task(watch.ask(is_crowd=number > 0)) for number in range(CLIENTS)]
    up_s = await watch.until(MOST, UP_WITHIN_S)
    watch.has_crowd = False
    holds = [asyncio.create_task(watch.hold()) for _ in range(2 * MOST)]
    down_s = await watch.until(1, DOWN_WITHIN_S)
    streams = await asyncio.gather(*holds)
    watch.is_over = True
    await asyncio.gather(*clients)
    for answer in watch.answers:
        if not answer.is_whole:
            print("failed:", answer.error)
    went_on_s = [
        answer.event_s[-1] - left_s
        for answer in streams
        if answer.is_whole
        and (left_s := watch.left_s.get(answer.headers["x-replica-id"])) is not None
    ]
    return [
        Row(f"1 to {MOST} replicas under a crowd, s", (up_s,), UP_BAR_S, "lower"),
        Row(f"{MOST} to 1 replicas after it, s", (down_s,), DOWN_BAR_S, "lower"),
        Row("requests", (float(len(watch.answers)),)),
        Row(
            "failed requests",
            (float(sum(not each.is_whole for each in watch.answers)),),
            0,
            "lower",
        ),
        Row("streams on replicas that left under them", (float(len(went_on_s)),), 1),
        Row(
            "the longest such stream went on, s",
            (max(went_on_s, default=0.0),),
            LONG_STREAM_S,
        ),
    ]


@contextmanager
def service(base: Path) -> Iterator[tuple[str, str]]:
    """The URL and the model's name of a cluster that `flora up` started."""
    with tempfile.TemporaryDirectory(prefix="flora-autoscaling-") as folder:
        config = Path(folder, "settings.yaml")
        config.write_text(yaml.safe_dump(SETTINGS))
        environment = os.environ | {"FLORA_HOME": folder}

        def flora(*arguments: str) -> str:
            command = [sys.executable, "-m", "cli", *arguments, "--json"]
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            return run.stdout.decode()

        replicas = f"1..{MOST}"
        up = ("up", "--base", str(base), "--replicas", replicas, "--port", "0")
        started = json.loads(flora(*up, "--config", str(config)))
        try:
            yield started["url"], started["base"]
        finally:
            flora("down")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a model directory")
    with service(parser.parse_args().base) as (url, model):
        rows = asyncio.run(measure(url, model))
    print_rows(rows)
    path = write_result(
        "autoscaling",
        CLAIM,
        rows,
        seed=0,
        workload={
            "crowd": f"{CLIENTS} clients in a closed loop, {len(PROMPT)} prompt and {CROWD_TOKENS} answer tokens",
            "streams": f"{2 * MOST} of {STREAM_TOKENS} tokens, begun when the crowd goes",
            "settings": SETTINGS,
        },
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
