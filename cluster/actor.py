"""The placement manager as a Ray actor: threads, a lock and a name around `PlacementManager`, no decisions.

One per application and settings, detached, found by name by every replica and router, started by whoever comes first.
It ends itself when nobody has called for a while.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict

from cluster.config import ClusterSettings
from cluster.figures import ClusterFigures
from cluster.manager import PlacementManager
from cluster.published import Published, PublishedReader
from cluster.registry_word import RegistryWord
from cluster.state import ClusterState
from cluster.table import ReaderReport, ReplicaOrders, ReplicaReport, TableUpdate
from storage.collecting import Collecting
from storage.config import StorageSettings
from storage.errors import FloraError, UnknownModelError
from storage.registry import Registry
from storage.stores import open_store

NAMESPACE = "flora"
IDLE_EXIT_S = 300.0
PLAN_PAUSE_S = 0.05
"""Between two plans, however much happens; those who call must have the processor too."""
_CALLS_AT_ONCE = 64
_DIGEST_LENGTH = 12
_SWITCH_S = 0.001
"""In the actor's process, who computes lets others have the interpreter this often."""

_log = logging.getLogger(__name__)


class PlacementSpec(BaseModel):
    """What makes one manager differ from another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    app_name: str
    base_id: str
    cluster: ClusterSettings
    storage: StorageSettings

    @property
    def actor_name(self) -> str:
        """Of this application under these settings: others need another manager."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return _prefix(self.app_name) + digest[:_DIGEST_LENGTH]


def _prefix(app_name: str) -> str:
    return f"flora-placement-{app_name}-"


class PlacementActor:
    """Every method may be called from any thread and returns in milliseconds: the registry is read, and plans are made,
    on threads of their own that hold no lock meanwhile.

    Args:
        is_alone: nothing else runs in this process, whose interpreter it may set as it needs.
    """

    def __init__(self, spec: PlacementSpec, *, is_alone: bool = False) -> None:
        self._spec = spec
        self._settings = spec.cluster
        self._manager = PlacementManager(
            spec.cluster,
            spec.base_id,
            # Grows over restarts, and faster than one epoch a millisecond no table changes.
            first_epoch=int(time.time() * 1000),
            clock=time.monotonic,
        )
        self._figures = ClusterFigures()
        self._lock = threading.Lock()
        self._thinking = threading.Lock()  # one thread computes at a time; always taken first
        self._collecting = Collecting(time.monotonic) if is_alone else None
        if is_alone:
            sys.setswitchinterval(_SWITCH_S)
        self._news = threading.Event()  # for the thread that reads the registry
        self._due = threading.Event()  # for the thread that plans
        self._called_s = time.monotonic()
        self._registry_error: str | None = "not read yet"
        self.plan_s = 0.0  # how long the last plan took
        self._is_over = False
        for work in (self._follow_registry, self._plan):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def heartbeat(self, report: ReplicaReport) -> ReplicaOrders | None:
        """As `PlacementManager.heartbeat`."""
        with self._calling() as manager:
            self._figures.heard(report)
            return manager.heartbeat(report)

    def poll(self, reader: ReaderReport) -> TableUpdate:
        """As `PlacementManager.poll`."""
        with self._calling() as manager:
            return manager.poll(reader)

    def leave(self, replica_ids: Collection[str]) -> None:
        """As `PlacementManager.leave`."""
        with self._calling() as manager:
            manager.leave(replica_ids)

    def prepare_to_shrink(self) -> bool:
        """Have second copies made of all that is wanted, for some seconds from now. True once they are all there."""
        with self._calling() as manager:
            manager.prepare_to_shrink()
            return manager.is_ready_to_shrink

    def nudge(self) -> None:
        """Something was published: read the registry now instead of at the next poll."""
        self._news.set()

    def state(self) -> ClusterState:
        """Everything, for people to look at."""
        with self._calling() as manager:
            self._figures.planned(manager.placement.holders)
            return replace(
                manager.state(),
                registry_error=self._registry_error,
                figures=self._figures.read(),
                plan_s=self.plan_s,
            )

    @contextmanager
    def _calling(self) -> Iterator[PlacementManager]:
        """The manager for somebody who calls, who may have told it what makes a new plan due."""
        with self._lock:
            self._called_s = time.monotonic()
            yield self._manager
            self._notice()

    def _notice(self) -> None:
        if self._manager.wants_tick:
            self._due.set()

    def stop(self) -> None:
        """End its threads, soon."""
        self._is_over = True
        self._news.set()
        self._due.set()

    def _follow_registry(self) -> None:
        registry: Registry | None = None
        reader: PublishedReader | None = None
        last: Published | None = None
        while not self._is_over:
            try:
                registry = registry or Registry(open_store(self._spec.storage))
                reader = reader or PublishedReader(registry)
                published = reader.read()
                self._registry_error = None
                if published is not last:
                    self._take(published)
                    last = published
                self._examine(registry)
            except FloraError as error:
                self._registry_error = error.message
                _log.warning("the registry cannot be read: %s", error.message)
            except Exception as error:
                # This thread must outlive anything a store may raise; the table stays as it is.
                self._registry_error = type(error).__name__
                _log.exception("the registry cannot be read")
            self._news.wait(self._settings.registry_poll_s)
            self._news.clear()

    def _examine(self, registry: Registry) -> None:
        """Read again what replicas called corrupt: quarantine it for everybody, or hold it against them alone.

        One version only, which may be large: what is published meanwhile should not wait for more.
        """
        with self._lock:
            suspects = self._manager.suspects()
        if not suspects:
            return
        suspect = suspects[0]
        _log.error("version %s was called corrupt: %s", suspect.version, suspect.message)
        try:
            is_bad = registry.quarantine(suspect.version, suspect.message)
        except UnknownModelError:  # deleted since
            is_bad = False
        if not is_bad:
            with self._lock:
                self._manager.acquit(suspect.version)

    def _take(self, published: Published) -> None:
        with self._thinking:
            # Made of tens of thousands of entries: not while everybody waits.
            word = RegistryWord(
                published.aliases,
                published.facts,
                published.history,
                published.quarantined,
                published.pins,
            )
            with self._lock:
                self._manager.set_registry(word)
                self._notice()
            self._settle()

    def _settle(self) -> None:
        if self._collecting is not None:
            self._collecting.settle()

    def _plan(self) -> None:
        while not self._is_over:
            self._due.wait(self._settings.tick_s)
            self._due.clear()
            try:
                with self._thinking:
                    self._plan_once()
            except Exception:
                # This thread must outlive a plan that fails; the one before stays in force.
                _log.exception("no plan can be made")
            idle_s = time.monotonic() - self._called_s
            if idle_s > IDLE_EXIT_S:
                _log.info("no replica or router has called for %.0f s; this manager ends", idle_s)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
            time.sleep(PLAN_PAUSE_S)

    def _plan_once(self) -> None:
        with self._lock:
            inputs = self._manager.begin_tick()
        if inputs is None:
            return
        began_s = time.perf_counter()
        result = self._manager.plan(inputs)
        self.plan_s = time.perf_counter() - began_s
        with self._lock:
            self._manager.end_tick(result)
            self._figures.planned(result.placement.holders)
            self._notice()
        self._settle()


def connect(spec: PlacementSpec) -> Any:
    """A handle to the manager of `spec`, started if there is none."""
    actor = ray.remote(PlacementActor).options(
        name=spec.actor_name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=_CALLS_AT_ONCE,
        num_cpus=0,
    )
    return actor.remote(spec, is_alone=True)


def stop_managers(app_name: str) -> None:
    """End every manager of an application. No error when there is none."""
    for entry in ray.util.list_named_actors(all_namespaces=True):
        is_ours = entry["name"][:-_DIGEST_LENGTH] == _prefix(app_name)
        if is_ours and entry["namespace"] == NAMESPACE:
            with suppress(ValueError):  # it may end itself in between
                ray.kill(ray.get_actor(entry["name"], NAMESPACE), no_restart=True)
