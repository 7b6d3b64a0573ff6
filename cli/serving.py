"""A private Ray with the application deployed on it: what `flora up` leaves running and `flora demo` ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cli.interrupts import shielded
from cli.local_cluster import LocalCluster, start_cluster
from cli.replicas import ReplicaRange
from cli.running import RunningCluster
from cli.settings import base_directory, base_name, command_settings
from deployments.settings import Settings

_LOOPBACK = {"host": "127.0.0.1", "allow_anonymous": True}


def local_settings(
    config: Path | None,
    *,
    base: str | None,
    replicas: ReplicaRange | None,
    **areas: Mapping[str, Any],
) -> Settings:
    """Settings of a cluster on this one machine, open to its users only; the base model is fetched if need be."""
    given = {name: dict(fields) for name, fields in areas.items()}
    serve = {**given.pop("serve", {}), **_LOOPBACK}
    if replicas is not None:
        serve |= {"min_replicas": replicas.least, "max_replicas": replicas.most}
    engine = given.pop("engine", {})
    plain = command_settings(config, serve=serve, engine=engine, **given)
    directory = base_directory(base or plain.engine.base, plain.storage)
    engine["base"] = str(directory)
    if base is not None:
        engine["base_id"] = base_name(base, directory)
    return command_settings(config, serve=serve, engine=engine, **given)


def start_serving(settings: Settings, report: Callable[[str], None]) -> RunningCluster:
    """Start Ray, deploy, and return once it answers. Whatever ends this early leaves nothing running."""
    from training.job_settings import JobSettings, as_environment

    report("starting a private Ray")
    shared = JobSettings(storage=settings.storage, training=settings.training)
    ray = start_cluster(
        num_cpus=logical_cpus(settings),
        # So that a job submitted by Ray's own means publishes where this cluster looks.
        variables=as_environment(shared),
        outlives_caller=True,
    )
    running = RunningCluster(ray, settings.model_dump(mode="json"))
    try:
        running.save()
        ready = running.ready_at(deploy_on(ray, settings, report))
        ready.save()
    except BaseException:
        with shielded():
            running.stop()
        raise
    return ready


def deploy_on(ray: LocalCluster, settings: Settings, report: Callable[[str], None]) -> str:
    """Deploy the application on a private Ray that is there already; returns its URL once it answers."""
    from deployments.launching import deploy

    report(f"starting {settings.serve.min_replicas} × {settings.engine.base_id}")
    ray.connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        return deploy(settings)
    finally:
        ray.disconnect()


def logical_cpus(settings: Settings) -> int:
    """Enough for every replica, the ingress and a training job: on one machine they take turns, not reservations."""
    replicas = settings.serve.max_replicas * settings.serve.cpus_per_replica
    training = settings.training.num_workers * settings.training.cpus_per_worker
    return max(os.cpu_count() or 1, round(replicas + training) + 4)
