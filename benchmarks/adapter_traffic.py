"""Clients of a server with many adapters: a closed loop by Zipf's law, and warm streams beside short arrivals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, pairwise
from statistics import median, quantiles

from benchmarks.stream_client import Streamed, stream
from benchmarks.workload import Batch, Zipf

SEED = 0


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

    @property
    def arrivals_of_a_side(self) -> int:
        return int(self.side_s * self.arrivals_per_s)


class Traffic:
    """Asks a running application.

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
        """(hits, misses) of each round; the sides take turns, and so does who begins.

        Raises ValueError when fewer adapters were never asked for than the rounds take.
        """
        plan = self._plan
        hot = self._names[: plan.warm_adapters]
        hits = self._names[plan.warm_adapters :][: plan.hit_adapters]
        fresh = [name for name in self._names if name not in self._asked]
        if len(fresh) < (rounds + 1) * plan.arrivals_of_a_side:
            raise ValueError(
                f"{len(fresh)} adapters nobody asked for are too few for {rounds} rounds"
            )
        untouched = iter(fresh)
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
        for number in range(plan.arrivals_of_a_side):
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
        return cls(window.on_device, seconds / tokens, p99(pauses))


def _told(window: Window) -> str:
    waits = [one.first_token_s for one in window.arrivals]
    return (
        f"{len(waits)} arrivals, {window.on_device:.0%} on the device, "
        f"first token after {median(waits):.2f} s, the latest after {max(waits):.2f} s"
    )


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, between the values beside it."""
    return quantiles(values, n=100, method="inclusive")[98]


def _prompts(tokens: int, vocabulary: int) -> Iterator[list[int]]:
    """Other prompts all the time, so that no cache of prefixes helps anybody."""
    batch = Batch(requests=256, prompt_tokens=tokens, vocabulary=vocabulary)
    for seed in count(SEED):
        yield from batch.prompts(seed)
