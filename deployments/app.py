"""The Serve application: `serve run deployments.app:build_app`, or the same import path in a Serve config file.

Its `args` are the settings (`deployments.settings.Settings`): unknown keys are errors.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from cluster.actor import NAMESPACE, PlacementSpec
from cluster.key_store import KeyStore
from deployments.ingress import Ingress, http_app_builder
from deployments.replica import EngineReplica
from deployments.router import AdapterRouter
from deployments.scaling_policy import ScalingPolicy
from deployments.settings import Settings, read_settings
from storage.errors import SpecificationError
from storage.stores import open_store

ENGINE = "Engine"
INGRESS = "Ingress"
_INGRESS_CPUS = 0.1
_INGRESS_ONGOING = 2048
_HEALTH_CHECK_S = 5.0
_LAST_WORDS_S = 10.0  # from the end of a replica's last request to its own
_DRAIN_LOOK_S = 0.5  # how often it looks whether its requests have ended
_REPORTS_KEPT = 5


def build_app(args: Settings | Mapping[str, Any]) -> Application:
    """The application of one base model: the HTTP ingress and the engine replicas behind it.

    Args:
        args: the settings, or a mapping of them by area.

    Raises:
        SpecificationError: a setting is wrong; `param` names it.
        StoreUnavailableError: API keys are needed, and the registry that keeps them cannot be reached.
    """
    settings = args if isinstance(args, Settings) else read_settings(**dict(args))
    check_door(settings)
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
        graceful_shutdown_timeout_s=grace_s(settings),
        graceful_shutdown_wait_loop_s=_DRAIN_LOOK_S,
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
        graceful_shutdown_timeout_s=grace_s(settings),
        graceful_shutdown_wait_loop_s=_DRAIN_LOOK_S,
        **_scaling(settings, spec),
    )


def _scaling(settings: Settings, spec: PlacementSpec) -> dict[str, Any]:
    """A fixed number of replicas, or one that `ScalingPolicy` decides: delays and factors of Serve's are not used."""
    sizes, autoscaling = settings.serve, settings.autoscaling
    if sizes.max_replicas == sizes.min_replicas:
        return {"num_replicas": sizes.min_replicas}
    policy = AutoscalingPolicy(
        policy_function=ScalingPolicy,
        policy_kwargs={
            "settings": autoscaling.model_dump(mode="json"),
            "manager": spec.actor_name,
            "namespace": NAMESPACE,
            "drain_s": grace_s(settings),
        },
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=sizes.min_replicas,
            max_replicas=sizes.max_replicas,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            metrics_interval_s=autoscaling.report_s,
            look_back_period_s=_REPORTS_KEPT * autoscaling.report_s,
            policy=policy,
        )
    }


def grace_s(settings: Settings) -> float:
    """How long a replica that leaves may take: whatever it answers ends by then."""
    return settings.serve.request_timeout_s + _LAST_WORDS_S


def check_door(settings: Settings) -> None:
    """Nobody serves by accident what everybody can reach.

    Raises:
        SpecificationError: there is no key that opens this server, or it is open to others than this machine.
        StoreUnavailableError: the registry, which keeps the keys, cannot be reached.
    """
    if not settings.serve.allow_anonymous:
        if not KeyStore(open_store(settings.storage)).keys():
            raise SpecificationError(
                "there are no API keys yet: make one with `flora keys create`, or set serve.allow_anonymous to "
                "serve requests of this machine without one (`flora up` does)",
                param="serve.allow_anonymous",
            )
    elif not _is_loopback(settings.serve.host):
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
