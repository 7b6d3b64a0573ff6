"""The placement manager answers heartbeats and polls in milliseconds with 10,000 adapters on 64 replicas, also while it
plans and while adapters are published.

The actor's own class runs in this process without Ray, over a real registry on disk. One thread plays the replicas,
which hold what they are told and what their requests load (Zipf 1), another the readers, which report the demand; both
call at the pace of heartbeats and pickle what goes over the wire, as Ray would. Times are from call to answer; the two
threads share the interpreter with the manager's, so they wait for it as callers of the actor do.
"""

from __future__ import annotations

import argparse
import pickle
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import TypeVar

from benchmarks.models_list import BASE_ID, publishing, write_records
from benchmarks.results_file import Row, print_rows, write_result
from cluster.actor import PlacementActor, PlacementSpec
from cluster.config import ClusterSettings
from cluster.table import ReplicaOrders, ReplicaReport
from cluster.view import TableView
from deployments.heartbeat import brief
from storage.config import StorageSettings
from storage.identity import AdapterVersion
from storage.registry import Registry
from storage.stores import open_store

Q = TypeVar("Q")
A = TypeVar("A")

_ROWS = 800
_REQUESTS_PER_S = 2000.0
_WORK = 500.0
_BAR_MS = 20.0
_WARM_UP_S = 10.0


@dataclass
class Replica:
    """Its device, and the versions on its disk, the least recently used first."""

    name: str
    told: ReplicaReport | None = None
    device: OrderedDict[AdapterVersion, None] = field(default_factory=OrderedDict)
    disk: OrderedDict[AdapterVersion, None] = field(default_factory=OrderedDict)

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            self.name,
            rows=_ROWS,
            num_bytes=1 << 30,
            device=tuple(self.device),
            disk=tuple(self.disk),
        )

    def use(self, version: AdapterVersion, max_resident: int = 120) -> None:
        for tier, most in ((self.device, max_resident), (self.disk, 20 * max_resident)):
            tier[version] = None
            tier.move_to_end(version)
            if len(tier) > most:
                tier.popitem(last=False)

    def obey(self, orders: ReplicaOrders | None) -> None:
        for version in orders.wanted if orders else ():
            self.use(version)


@dataclass
class Wire:
    """Milliseconds from call to answer, and bytes of question and answer, of one kind of call."""

    ms: list[float] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)

    def call(self, question: Q, ask: Callable[[Q], A]) -> A:
        sent = pickle.dumps(question, pickle.HIGHEST_PROTOCOL)
        began_s = time.perf_counter()
        answer = ask(pickle.loads(sent))
        self.ms.append((time.perf_counter() - began_s) * 1e3)
        received = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        self.asked.append(len(sent))
        self.answered.append(len(received))
        result: A = pickle.loads(received)
        return result

    def clear(self) -> None:
        for each in (self.ms, self.asked, self.answered):
            each.clear()


class Cluster:
    """Everybody who calls the manager, each kind on a thread of its own, until `stop`."""

    def __init__(
        self, actor: PlacementActor, replicas: int, readers: int, versions: Sequence[AdapterVersion]
    ) -> None:
        self._actor = actor
        self._versions = versions
        self._weights = [1 / rank for rank in range(1, len(versions) + 1)]
        self._replicas = [Replica(f"replica-{number:03d}") for number in range(replicas)]
        self._views = [TableView(time.monotonic) for _ in range(readers)]
        self.heartbeats, self.polls = Wire(), Wire()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._beat, self._poll)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_served(self) -> int:
        """Aliases in the first reader's table."""
        return len(self._views[0].table.serving)

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _beat(self) -> None:
        chosen = random.Random(1)
        while not self._is_over.is_set():
            for replica in self._replicas:
                for version in chosen.choices(self._versions, self._weights, k=2):
                    replica.use(version)
                report = replica.report()
                orders = self.heartbeats.call(brief(report, replica.told), self._actor.heartbeat)
                replica.told = None if orders is not None and orders.asks_all else report
                replica.obey(orders)
                self._is_over.wait(0.5 / len(self._replicas))

    def _poll(self) -> None:
        chosen = random.Random(2)
        count = int(_REQUESTS_PER_S * 0.5 / len(self._views))
        while not self._is_over.is_set():
            for view in self._views:
                for version in chosen.choices(self._versions, self._weights, k=count):
                    view.record(version, _WORK)
                view.offer(self.polls.call(view.take_report(), self._actor.poll))
                self._is_over.wait(0.5 / len(self._views))


def rows_of(name: str, wire: Wire) -> list[Row]:
    cuts = quantiles(wire.ms, n=100)
    return [
        Row(f"{name}, ms, median", (median(wire.ms),), better="lower"),
        Row(f"{name}, ms, 99 %", (cuts[98],), _BAR_MS, "lower"),
        Row(f"{name}, ms, longest", (max(wire.ms),), better="lower"),
        Row(f"{name}, kB sent, mean", (mean(wire.asked) / 1e3,), better="lower"),
        Row(f"{name}, kB answered, mean", (mean(wire.answered) / 1e3,), better="lower"),
    ]


def watch(actor: PlacementActor, seconds: float) -> list[float]:
    """How long each plan took that was made meanwhile, in seconds."""
    plans: dict[float, None] = {}
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        plans[actor.plan_s] = None
        time.sleep(0.5)
    return list(plans)


def measure(adapters: int, replicas: int, readers: int, seconds: float) -> list[Row]:
    """Figures of a manager whose callers, and the demand they tell of, have been there for a while."""
    with tempfile.TemporaryDirectory() as directory:
        storage = StorageSettings(registry=f"{directory}/registry")
        store = open_store(storage)
        write_records(store, adapters)
        registry = Registry(store)
        entries = registry.index().adapters.values()
        spec = PlacementSpec(
            app_name="benchmark", base_id=BASE_ID, cluster=ClusterSettings(), storage=storage
        )
        actor = PlacementActor(spec, is_alone=True)
        versions = [entry.versions[0].version for entry in entries]
        cluster = Cluster(actor, replicas, readers, versions)
        while cluster.num_served < adapters:
            time.sleep(0.1)
        plans = watch(actor, _WARM_UP_S)
        result = []
        for when in ("", " while others publish"):
            cluster.heartbeats.clear()
            cluster.polls.clear()
            with publishing(registry, adapters) if when else nullcontext():
                plans += watch(actor, seconds)
            result += rows_of(f"heartbeat{when}", cluster.heartbeats)
            result += rows_of(f"poll{when}", cluster.polls)
        cluster.stop()
        actor.stop()
        return [*result, Row("plan, s", tuple(plans), better="lower")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0, help="Of each of the two parts.")
    arguments = parser.parse_args()
    rows = measure(arguments.adapters, arguments.replicas, arguments.readers, arguments.seconds)
    print_rows(rows)
    workload = {
        "adapters": arguments.adapters,
        "replicas": arguments.replicas,
        "readers": arguments.readers,
        "rows of a bank": _ROWS,
        "requests per second, Zipf 1": _REQUESTS_PER_S,
        "seconds": arguments.seconds,
    }
    claim = (
        f"the placement manager answers in {_BAR_MS:g} ms with {arguments.adapters:,} adapters on "
        f"{arguments.replicas} replicas"
    )
    print(write_result("placement_manager", claim, rows, seed=1, workload=workload))


if __name__ == "__main__":
    main()
