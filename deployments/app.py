"""The Serve application: `serve run deployments.app:build_app`, or the same import path in a Serve config file.

Its `args` are the settings (`deployments.settings.Settings`): unknown keys are errors.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.actor import PlacementSpec
from deployments.ingress import Ingress, http_app_builder
from deployments.replica import EngineReplica
from deployments.router import AdapterRouter
from deployments.settings import Settings, read_settings
from storage.errors import SpecificationError

ENGINE = "Engine"
INGRESS = "Ingress"
_INGRESS_CPUS = 0.1
_INGRESS_ONGOING = 2048
_HEALTH_CHECK_S = 5.0
_SHUTDOWN_GRACE_S = 10.0


def build_app(args: Settings | Mapping[str, Any]) -> Application:
    """The application of one base model: the HTTP ingress and the engine replicas behind it.

    Args:
        args: the settings, or a mapping of them by area.

    Raises:
        SpecificationError: a setting is wrong; `param` names it.
    """
    settings = args if isinstance(args, Settings) else read_settings(**dict(args))
    _check_door(settings)
    spec = placement_spec(settings)
    engine = _engine_deployment(settings, spec).bind(settings, spec)
    ingress = serve.deployment(
        serve.ingress(http_app_builder(settings, spec, ENGINE))(Ingress)
    ).options(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=_INGRESS_ONGOING,
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        health_check_period_s=_HEALTH_CHECK_S,
    )
    return ingress.bind(engine)


def placement_spec(settings: Settings) -> PlacementSpec:
    """The placement manager that belongs to these settings."""
    return PlacementSpec(
        app_name=settings.serve.app_name,
        base_id=settings.engine.base_id,
        cluster=settings.cluster,
        storage=settings.storage,
    )


def _engine_deployment(settings: Settings, spec: PlacementSpec) -> serve.Deployment:
    sizes = settings.serve
    scaling: dict[str, Any] = {"num_replicas": sizes.min_replicas}
    if sizes.max_replicas > sizes.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": sizes.min_replicas,
                "max_replicas": sizes.max_replicas,
                "target_ongoing_requests": settings.engine.max_sequences,
            }
        }
    return serve.deployment(EngineReplica).options(
        name=ENGINE,
        max_ongoing_requests=sizes.max_ongoing_requests,
        max_queued_requests=sizes.max_ongoing_requests * sizes.max_replicas,
        ray_actor_options={"num_cpus": sizes.cpus_per_replica, "num_gpus": sizes.gpus_per_replica},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"spec": spec.model_dump(mode="json")},
        ),
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=_SHUTDOWN_GRACE_S,
        **scaling,
    )


def _check_door(settings: Settings) -> None:
    """Keys come in a later release; until then nobody serves by accident what everybody can reach."""
    if not settings.serve.allow_anonymous:
        raise SpecificationError(
            "this release has no API keys yet: set serve.allow_anonymous to serve requests of this "
            "machine without one (`flora up` does)",
            param="serve.allow_anonymous",
        )
    if not _is_loopback(settings.serve.host):
        raise SpecificationError(
            f"serve.allow_anonymous is only for a loopback address such as 127.0.0.1, "
            f"not {settings.serve.host}",
            param="serve.host",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
