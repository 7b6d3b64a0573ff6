"""The autoscaling policy of the engine deployment: Serve's controller asks it, `cluster.autoscaling` answers.

Runs in Serve's controller, ten times a second, so it imports little and waits for nobody: what placement says is asked
for in the background. Serve pickles this module, but the controller must be able to import `cluster`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.autoscaling import Autoscaler, ReplicaSignals
from cluster.config import AutoscalingSettings

ASK_EVERY_S = 0.5
ANSWER_VALID_S = 3.0
TELL_EVERY_S = 2.0

_log = logging.getLogger("ray.serve")


class ManagerLink:
    """What the policy and the placement manager have to say to each other, without waiting.

    Args:
        find: looks the manager up; raises ValueError while there is none.
        answer_of: what became of a question: yes or no, or None while there is no answer.
        drain_s: the longest a replica takes to leave.
    """

    def __init__(
        self,
        find: Callable[[], Any],
        answer_of: Callable[[Any], bool | None],
        drain_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._find = find
        self._answer_of = answer_of
        self._drain_s = drain_s
        self._clock = clock
        self._asked: Any = None
        self._asked_s = self._yes_s = self._told_s = float("-inf")
        self._leaving: dict[str, float] = {}

    @property
    def is_prepared(self) -> bool:
        """Whoever leaves, what it holds lies on another replica: so it was said a moment ago."""
        return self._clock() - self._yes_s <= ANSWER_VALID_S

    def prepare(self) -> None:
        """A replica should leave: let the placement manager prepare, or go on preparing, and take its answer."""
        now_s = self._clock()
        if self._asked is not None:
            answer = self._answer_of(self._asked)
            if answer is None:
                return
            self._asked = None
            if answer:  # true of when it was asked, however late it is collected
                self._yes_s = self._asked_s
        if now_s - self._asked_s >= ASK_EVERY_S:
            self._asked_s = now_s
            with suppress(RayError, ValueError):  # there is none for a moment: nobody leaves
                self._asked = self._find().prepare_to_shrink.remote()

    def tell(self, gone: Collection[str], running: Collection[str]) -> None:
        """Replicas in `gone` take no requests any more; while they finish what they have, they are nobody's home."""
        now_s = self._clock()
        before = self._leaving.keys()
        self._leaving = {
            replica_id: since_s
            for replica_id, since_s in {**self._leaving, **dict.fromkeys(gone, now_s)}.items()
            if replica_id not in running and now_s - since_s <= self._drain_s
        }
        # Again and again: a manager that was started anew must hear of it too.
        is_due = self._leaving and now_s - self._told_s >= TELL_EVERY_S
        if self._leaving.keys() != before or is_due:
            self._told_s = now_s
            with suppress(RayError, ValueError):
                self._find().leave.remote(tuple(self._leaving))


def ray_answer(asked: Any) -> bool | None:
    """The result of an actor's method, if it is there; a lost actor says no."""
    if not ray.wait([asked], timeout=0)[0]:
        return None
    try:
        return bool(ray.get(asked))
    except RayError as error:
        _log.warning("the placement manager does not answer: %s", type(error).__name__)
        return False


class ScalingPolicy:
    """Made once by Serve for a deployed configuration; called for each decision.

    Args:
        settings: of `AutoscalingSettings`, as JSON.
        manager: the placement manager's actor name.
        namespace: the actor's.
        drain_s: the longest a replica takes to leave.
    """

    def __init__(
        self, settings: Mapping[str, Any], manager: str, namespace: str, drain_s: float
    ) -> None:
        self._scaler = Autoscaler(AutoscalingSettings(**settings), time.monotonic)
        find = partial(ray.get_actor, manager, namespace)
        self._link = ManagerLink(find, ray_answer, drain_s, time.monotonic)
        self._running: frozenset[str] = frozenset()
        self._reason = ""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas for a `ray.serve.config.AutoscalingContext`; no state of Serve's is used."""
        running = frozenset(replica.unique_id for replica in context.running_replicas)
        for replica_id, signals, stamp_s in _reports(context.raw_metrics):
            self._scaler.report(replica_id, signals, stamp_s)
        target = context.target_num_replicas
        scale = self._scaler.decide(
            running,
            target,
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
            is_prepared=self._link.is_prepared,
        )
        self._link.tell(self._running - running, running)
        self._running = running
        if scale.wants_fewer:
            self._link.prepare()
        if scale.reason != self._reason:
            self._reason = scale.reason
            if scale.reason:
                _log.info("replicas: %d, were %d: %s", scale.replicas, target, scale.reason)
        return scale.replicas, {}


def _reports(
    raw_metrics: Mapping[str, Mapping[Any, Any]],
) -> list[tuple[str, ReplicaSignals, float]]:
    """The last point of every replica's series, with its time on the replica's own clock."""
    stats: dict[str, dict[str, float]] = {}
    stamps: dict[str, float] = {}
    for name, by_replica in raw_metrics.items():
        for replica, series in by_replica.items():
            if series:
                stats.setdefault(replica.unique_id, {})[name] = series[-1].value
                stamps[replica.unique_id] = series[-1].timestamp
    return [
        (replica_id, signals, stamps[replica_id])
        for replica_id, values in stats.items()
        if (signals := ReplicaSignals.of_stats(values)) is not None
    ]
