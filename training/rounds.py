"""A job's rounds, as each of its workers goes through them: train a share, save it, agree that the round counts.

Every worker goes through every round, also one that has nothing to train: a round counts when all have saved theirs.
A round is as much work for each: who has cheaper steps takes more of them, or all would wait for the slowest each time.
At its border the work that is left is shared out again if somebody would run dry. Knows nothing of Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from storage.errors import StoreUnavailableError
from storage.identity import AdapterVersion
from storage.index import parallel
from training.adapter_run import AdapterRun, RunStatus
from training.checkpoints import Checkpoints
from training.commit import Commit, SavedAdapter
from training.events import AdapterPublished, EventSink, RoundFinished, WorkerStarted
from training.job_store import EventWriter, JobStore
from training.sharing import Shares, share_again
from training.spec import AdapterSpec

T = TypeVar("T")

_MOST_STEPS = 4
"""A worker takes at most so many times the steps that it was asked to: costs are estimates."""

_SAVED_AT_ONCE = 4
"""Each of them is in memory twice more, as bytes; a store far away answers so many at a time."""

logger = logging.getLogger("flora.training")


class Peers(Protocol):
    """The workers of one attempt, of which this process is number `rank` of `size`.

    All of them make the same calls in the same order; each call waits for all. When one is lost the others' calls
    raise, or this process is stopped.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def from_first(self, value: T | None) -> T:
        """What worker 0 passed."""

    def gather(self, value: T) -> Sequence[T]:
        """What every worker passed, by rank."""

    def report(self, round_: int) -> None:
        """Tell whoever runs the workers that a round is done."""


class ShareTrainer(Protocol):
    """What a round needs of `MultiAdapterTrainer`, whose contract this is."""

    @property
    def runs(self) -> Sequence[AdapterRun]: ...

    @property
    def is_done(self) -> bool: ...

    @property
    def places(self) -> int: ...

    def step(self) -> None: ...

    def stop(self, adapter: str, reason: str) -> None: ...

    def leave_broken(self) -> None: ...

    def state_of(self, number: int) -> dict[str, Any]: ...

    def restore(self, number: int, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Work:
    """What all rounds together have to do.

    Attributes:
        digest: of what is trained.
        costs: of each adapter's whole training, in any unit.
        num_steps: of each adapter.
        steps_of_round: optimizer steps between two checkpoints, for the worker whose steps cost most.
    """

    digest: str
    costs: Mapping[str, float]
    num_steps: Mapping[str, int]
    steps_of_round: int

    def is_done(self, commit: Commit) -> bool:
        return all(commit.is_over(name) for name in self.costs)

    def left(self, commit: Commit) -> dict[str, float]:
        """Costs still to come, of the adapters that are not over; who has broken costs what it did."""
        return {
            name: cost * (1.0 - self._steps_done(name, commit) / (self.num_steps[name] + 1.0))
            for name, cost in self.costs.items()
            if not commit.is_over(name)
        }

    def cost_of_step(self, trainer: ShareTrainer) -> float:
        """Of one that all its places take part in."""
        costs = (
            self.costs[run.name] / self.num_steps[run.name]
            for run in trainer.runs
            if not run.is_over
        )
        return sum(sorted(costs, reverse=True)[: trainer.places])

    def _steps_done(self, name: str, commit: Commit) -> int:
        return commit.adapters[name].step if name in commit.adapters else 0


Build = Callable[[Sequence[str]], ShareTrainer]
"""A trainer of the adapters of these names, in this order, as they were before their first step."""

PublishAgain = Callable[[AdapterSpec], AdapterVersion | None]
"""Publishes what an earlier attempt was about to publish, if it was; the same content is the same version."""


def train_in_rounds(
    work: Work,
    peers: Peers,
    job: JobStore,
    checkpoints: Checkpoints,
    build: Build,
    publish_again: PublishAgain,
    tell: EventWriter,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Go on from the job's last commit until every adapter is over.

    Args:
        clock: seconds, to measure who waits for whom.

    Raises:
        Whatever the store, the trainer and the peers raise: the attempt has failed then, and the commit stands.
    """
    commit: Commit = peers.from_first(checkpoints.begin(work.digest) if peers.rank == 0 else None)
    checkpoints.join(commit)
    share: tuple[str, ...] | None = None
    trainer: ShareTrainer | None = None
    while not work.is_done(commit):
        shares = share_again(commit.shares, work.left(commit), peers.size)
        if shares[peers.rank] != share:
            share = shares[peers.rank]
            trainer = None  # the next one frees its memory, then takes its own
            tell(WorkerStarted(peers.rank, peers.size, socket.gethostname(), os.getpid(), share))
            if share:
                trainer = build(share)
                _restore(trainer, commit, checkpoints)
                _publish_again(trainer, checkpoints.finished.names(), publish_again, tell)
        if trainer is not None:
            _stop_cancelled(trainer, job)
        cost = 0.0 if trainer is None else work.cost_of_step(trainer)
        is_learning = trainer is not None and any(run.may_learn for run in trainer.runs)
        of_all = peers.gather((cost, is_learning))
        dearest = max(each for each, _ in of_all)
        if trainer is not None and not any(learns for _, learns in of_all):
            trainer.leave_broken()
        began_s = clock()
        saved: dict[str, SavedAdapter] = {}
        if trainer is not None:
            ratio = min(dearest / cost, _MOST_STEPS) if cost else 0
            steps = round(work.steps_of_round * ratio)
            saved = _round(trainer, steps, commit, checkpoints)
        tell.flush()  # what the commit rests on is told for good
        seconds = clock() - began_s
        told = peers.gather((saved, seconds))
        commit = _next(commit, shares, [saved for saved, _ in told])
        if peers.rank == 0:
            checkpoints.commit(commit)
            busy_s = tuple(busy for _, busy in told)
            tell(RoundFinished(commit.round, max(clock() - began_s, *busy_s), busy_s))
        peers.report(commit.round)
        if peers.rank == 0:
            _clean(checkpoints, commit)


def _restore(trainer: ShareTrainer, commit: Commit, checkpoints: Checkpoints) -> None:
    begun = [number for number, run in enumerate(trainer.runs) if run.name in commit.adapters]
    saved = [commit.adapters[trainer.runs[number].name] for number in begun]
    for number, state in zip(begun, parallel(checkpoints.load, saved), strict=True):
        trainer.restore(number, state)


def _publish_again(
    trainer: ShareTrainer,
    finished: Container[str],
    publish_again: PublishAgain,
    tell: EventSink,
) -> None:
    """Who had finished in an earlier attempt is not trained once more, though the last commit does not know it yet."""
    for number, run in enumerate(trainer.runs):
        if not run.may_learn or run.name not in finished:
            continue
        version = publish_again(run.spec)
        if version is not None:
            over = {**run.state(), "status": RunStatus.PUBLISHED.value, "outcome": version}
            trainer.restore(number, {"run": over, "rows": None, "best": None})
            tell(AdapterPublished(adapter=run.name, version=version, alias=run.spec.alias))


def _stop_cancelled(trainer: ShareTrainer, job: JobStore) -> None:
    with suppress(StoreUnavailableError):  # it is looked for again at the next round
        for adapter in job.stopped():
            trainer.stop(adapter, "it was cancelled")


def _round(
    trainer: ShareTrainer, steps: int, commit: Commit, checkpoints: Checkpoints
) -> dict[str, SavedAdapter]:
    for _ in range(steps):
        if trainer.is_done:
            break
        trainer.step()

    def save(number: int) -> SavedAdapter:
        run, state = trainer.runs[number], trainer.state_of(number)
        return checkpoints.save(commit, run.name, state, step=run.step, is_over=run.is_over)

    saved = parallel(save, range(len(trainer.runs)), at_once=_SAVED_AT_ONCE)
    return {run.name: one for run, one in zip(trainer.runs, saved, strict=True)}


def _next(commit: Commit, shares: Shares, saved: Sequence[Mapping[str, Any]]) -> Commit:
    # Those in nobody's share were over when the work was shared out again.
    adapters = dict(commit.adapters)
    for one in saved:
        adapters.update(one)
    return replace(commit, round=commit.round + 1, shares=shares, adapters=adapters)


def _clean(checkpoints: Checkpoints, commit: Commit) -> None:
    try:
        checkpoints.clean(commit)
    except StoreUnavailableError as error:
        logger.warning("superseded checkpoints stay until the next round: %s", error.message)
