"""What the HTTP routes stand on: one object for an ingress process, put together by `ingress.py` or by a test."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.published import Published
from cluster.state import ClusterState
from cluster.view import TableView
from deployments.gateway import EngineGateway
from deployments.metrics.exposition import Metrics
from deployments.model_names import ModelNames
from deployments.text import TextCodec
from storage.identity import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Api:
    """Parts of one ingress.

    `published` reads the registry and blocks; `cluster_state` asks the placement manager. Both raise our errors.
    """

    base_id: str
    created_s: int  # when this ingress started, seconds since 1970
    request_timeout_s: float
    allows_remote: bool  # whether requests from other machines are answered
    gateway: EngineGateway
    codec: TextCodec
    names: ModelNames
    view: TableView
    published: Callable[[], Published]
    cluster_state: Callable[[], Awaitable[ClusterState]]
    metrics: Metrics

    @property
    def tenant(self) -> str:
        """Whose adapters a request may use: without keys, there is one tenant."""
        return DEFAULT_TENANT


def new_request_id() -> str:
    return uuid.uuid4().hex
