"""What a job's rounds are tested with: workers that are threads, and trainers whose arithmetic is a few integers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from storage.identity import AdapterVersion, sha256_hex
from storage.object_store import ObjectStore
from tests.storage.passing_store import PassingStore
from training.adapter_run import AdapterData, AdapterRun, RunStatus
from training.checkpoints import Checkpoints
from training.events import AdapterPublished, AdapterStep, EventSink
from training.job_store import JobStore
from training.rounds import Build, Work, train_in_rounds
from training.spec import AdapterSpec
from training.tokens import TokenSequence

T = TypeVar("T")

JOB = "job"
STEPS = {"a": 3, "b": 7, "c": 12}
WORK = Work("d" * 64, {name: float(steps) for name, steps in STEPS.items()}, STEPS, 2)
SHORT_WORK = Work("d" * 64, {"a": 3.0, "b": 7.0}, STEPS, 4)


class KilledError(Exception):
    """What the rest of a killed process would have done, it has not done."""


class KillingStore(PassingStore):
    """Dead from one write on, for everything."""

    def __init__(self, store: ObjectStore, writes_left: int) -> None:
        super().__init__(store)
        self._writes_left = writes_left
        self._counting = threading.Lock()
        self.is_dead = False

    def before(self, *, is_write: bool) -> None:
        with self._counting:
            self._writes_left -= is_write
            self.is_dead |= self._writes_left < 0
            if self.is_dead:
                raise KilledError


class ThreadPeers:
    """Workers as threads of this process; when one is lost, the others' calls raise."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._table = table

    def from_first(self, value: T | None) -> T:
        first: T = self.gather(value)[0]  # type: ignore[assignment]
        return first

    def gather(self, value: T) -> Sequence[T]:
        self._table[self.rank] = value
        self._meeting.wait()
        values = list(self._table)
        self._meeting.wait()
        return values

    def report(self, round_: int) -> None:
        self._meeting.wait()

    def give_up(self) -> None:
        self._meeting.abort()


class SumTrainer:
    """Each adapter's "weights" are a number that every step changes, by its step; at its end it is published.

    Args:
        noise: added to what is published, as another batch would change the last bit.
    """

    def __init__(
        self,
        share: Sequence[str],
        publish: Callable[[str, bytes], str],
        tell: EventSink,
        noise: int,
    ) -> None:
        self.runs = [run_of(name) for name in share]
        self.sums = [1 for _ in share]
        self._publish = publish
        self._tell = tell
        self._noise = noise
        self.places = len(share)

    @property
    def is_done(self) -> bool:
        return all(run.is_over for run in self.runs)

    def step(self) -> None:
        for number, run in enumerate(self.runs):
            if run.is_over:
                continue
            run.step += 1
            self.sums[number] = (self.sums[number] * 31 + run.step) % 1_000_003
            self._tell(AdapterStep(run.name, run.step, run.num_steps, 1.0 / run.step, 0, 0, 0))
            if run.step == run.num_steps:
                content = f"{run.name} {self.sums[number]} {self._noise}".encode()
                run.status, run.outcome = RunStatus.PUBLISHED, self._publish(run.name, content)
                self._tell(AdapterPublished(run.name, run.outcome, "latest"))

    def stop(self, adapter: str, reason: str) -> None:
        for run in self.runs:
            if run.name == adapter and not run.is_over:
                run.status, run.outcome = RunStatus.FAILED, reason

    def leave_broken(self) -> None:
        pass  # sums never break

    def state_of(self, number: int) -> dict[str, Any]:
        return {
            "run": self.runs[number].state(),
            "rows": torch.tensor(self.sums[number]),
            "best": None,
        }

    def restore(self, number: int, state: Mapping[str, Any]) -> None:
        self.runs[number].restore(state["run"])
        if state["rows"] is not None:
            self.sums[number] = int(state["rows"])


def run_of(name: str) -> AdapterRun:
    spec = AdapterSpec.model_validate({"name": name, "rank": 1, "data": "none", "seed": 0})
    data = AdapterData((TokenSequence((1, 2), (False, True)),))
    return AdapterRun(spec, data, STEPS[name])


class SumPublisher:
    """Publishes into the store itself, under what it is of."""

    def __init__(self, store: ObjectStore, checkpoints: Checkpoints) -> None:
        self._store = store
        self._checkpoints = checkpoints

    def __call__(self, name: str, content: bytes) -> str:
        kept = self._checkpoints.keep_finished(name, {"content": content})["content"]
        key = f"published/{name}/{sha256_hex(kept)}"
        self._store.put(key, kept)
        return key

    def again(self, spec: AdapterSpec) -> AdapterVersion | None:
        files = self._checkpoints.finished.get(spec.name)
        return None if files is None else AdapterVersion(self(spec.name, files["content"]))


def run_attempt(
    store: ObjectStore,
    workers: int = 1,
    noise: int = 0,
    work: Work = WORK,
    driver: int = 0,
    build: Build | None = None,
) -> None:
    """One attempt of the job, to its end. Raises what any of its workers raised first.

    `build` makes other trainers than those that sum.
    """
    meeting, table = threading.Barrier(workers), [None] * workers
    errors: list[BaseException] = []

    def worker(rank: int) -> None:
        peers = ThreadPeers(rank, workers, meeting, table)
        job = JobStore(store, JOB)
        checkpoints = Checkpoints(store, JOB, driver)
        publisher = SumPublisher(store, checkpoints)
        try:
            with job.writer(f"worker-{rank}") as tell:
                train_in_rounds(
                    work,
                    peers,
                    job,
                    checkpoints,
                    build or (lambda share: SumTrainer(share, publisher, tell, noise)),
                    publisher.again,
                    tell,
                )
        except BaseException as error:
            errors.append(error)
            peers.give_up()

    if workers == 1:
        worker(0)
    else:
        threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def published(store: ObjectStore) -> dict[str, list[bytes]]:
    """name → everything that was ever published under it."""
    found: dict[str, list[bytes]] = {}
    for info in store.list("published/"):
        found.setdefault(info.key.split("/")[1], []).append(store.get(info.key).data)
    return found
