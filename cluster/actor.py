"""The placement manager as a Ray actor: threads, a lock and a name around `PlacementManager`, no decisions.

One per application and settings, detached, found by name by every replica and router, started by whoever comes first.
It ends itself when nobody has called for a while.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict

from cluster.config import ClusterSettings
from cluster.figures import ClusterFigures
from cluster.manager import PlacementManager
from cluster.published import Published, PublishedReader
from cluster.state import ClusterState
from cluster.table import DemandSample, ReplicaOrders, ReplicaReport, TableUpdate
from storage.config import StorageSettings
from storage.errors import FloraError
from storage.identity import AdapterVersion
from storage.registry import Registry
from storage.stores import open_store

NAMESPACE = "flora"
IDLE_EXIT_S = 300.0
_CALLS_AT_ONCE = 64
_DIGEST_LENGTH = 12

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
    """Every method may be called from any thread and returns in milliseconds: the registry is read elsewhere."""

    def __init__(self, spec: PlacementSpec) -> None:
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
        self._changed = threading.Event()
        self._called_s = time.monotonic()
        self._registry_error: str | None = "not read yet"
        for work in (self._follow_registry, self._tick):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def heartbeat(self, report: ReplicaReport) -> ReplicaOrders:
        with self._lock:
            self._called_s = time.monotonic()
            self._figures.heard(report)
            return self._manager.heartbeat(report)

    def poll(
        self,
        known_epoch: int,
        demand: Mapping[AdapterVersion, DemandSample],
        lost: frozenset[str] = frozenset(),
    ) -> TableUpdate:
        """`lost`: replicas the caller found dead since its last poll."""
        with self._lock:
            self._called_s = time.monotonic()
            self._manager.observe(demand)
            self._manager.lose(lost)
            return self._manager.poll(known_epoch)

    def leave(self, replica_ids: Collection[str]) -> None:
        with self._lock:
            self._manager.leave(replica_ids)

    def nudge(self) -> None:
        """Something was published: read the registry now instead of at the next poll."""
        self._changed.set()

    def state(self) -> ClusterState:
        """Everything, for people to look at."""
        with self._lock:
            self._called_s = time.monotonic()
            self._figures.planned(self._manager.placement.holders)
            return ClusterState(
                table=self._manager.poll(-1).table or self._manager.table(),
                reports=self._manager.reports(),
                too_large=self._manager.placement.too_large,
                no_room=self._manager.placement.no_room,
                registry_error=self._registry_error,
                figures=self._figures.read(),
            )

    def _follow_registry(self) -> None:
        reader: PublishedReader | None = None
        last: Published | None = None
        while True:
            try:
                reader = reader or PublishedReader(Registry(open_store(self._spec.storage)))
                published = reader.read()
            except FloraError as error:
                self._registry_error = error.message
                _log.warning("the registry cannot be read: %s", error.message)
            except Exception as error:
                # This thread must outlive anything a store may raise; the table stays as it is.
                self._registry_error = type(error).__name__
                _log.exception("the registry cannot be read")
            else:
                self._registry_error = None
                if published is not last:
                    with self._lock:
                        self._manager.set_registry(published.desired, published.facts)
                    last = published
            self._changed.wait(self._settings.registry_poll_s)
            self._changed.clear()

    def _tick(self) -> None:
        while True:
            time.sleep(self._settings.tick_s)
            with self._lock:
                self._manager.tick()
                self._figures.planned(self._manager.placement.holders)
                idle_s = time.monotonic() - self._called_s
            if idle_s > IDLE_EXIT_S:
                _log.info("no replica or router has called for %.0f s; this manager ends", idle_s)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


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
    return actor.remote(spec)


def stop_managers(app_name: str) -> None:
    """End every manager of an application. No error when there is none."""
    for entry in ray.util.list_named_actors(all_namespaces=True):
        is_ours = entry["name"][:-_DIGEST_LENGTH] == _prefix(app_name)
        if is_ours and entry["namespace"] == NAMESPACE:
            with suppress(ValueError):  # it may end itself in between
                ray.kill(ray.get_actor(entry["name"], NAMESPACE), no_restart=True)
