"""What the HTTP routes stand on: one object for an ingress process, put together by `ingress.py` or by a test."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from cluster.state import ClusterState
from cluster.view import TableView
from deployments.adapter_admin import AdapterAdmin
from deployments.callers import Caller, Doorkeeper
from deployments.errors import AdminOnlyError
from deployments.gateway import EngineGateway
from deployments.last_good import LastGood
from deployments.metrics.exposition import Metrics
from deployments.model_list import ModelList
from deployments.model_names import ModelNames
from deployments.text import TextCodec
from deployments.training_service import TrainingService
from deployments.upload import Uploads

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Api:
    """Parts of one ingress. `cluster_state` asks the placement manager, and raises our errors.

    Text and tokens have threads of their own, so that nothing that waits for a store holds answers up. Adapters are
    published by one, for an adapter being published lies in memory whole.
    """

    base_id: str
    created_s: int  # when this ingress started, seconds since 1970
    request_timeout_s: float
    replica_range: tuple[int, int]  # fewest and most engine replicas
    doorkeeper: Doorkeeper
    gateway: EngineGateway
    codec: TextCodec
    names: ModelNames
    view: TableView
    models: LastGood[ModelList]
    admin: AdapterAdmin
    uploads: Uploads
    training: TrainingService
    cluster_state: Callable[[], Awaitable[ClusterState]]
    metrics: Metrics
    text_threads: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(thread_name_prefix="text")
    )
    publishing_thread: Executor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="publishing")
    )

    async def on_text(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.text_threads, work)

    async def publish(self, work: Callable[[], Result]) -> Result:
        """Do what reads an adapter and publishes it, after whatever else is being published."""
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self.publishing_thread, work)
        self.names.forget()
        return result


def api_of(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


def caller_of(request: Request) -> Caller:
    """Who the door let in with this request."""
    caller: Caller = request.scope["caller"]
    return caller


def admin_of(request: Request) -> Caller:
    """Raises AdminOnlyError when the caller's key is a user's."""
    caller = caller_of(request)
    if not caller.is_admin:
        raise AdminOnlyError(f"{request.url.path} needs an admin key; this one is a user's")
    return caller


Admin = Annotated[Caller, Depends(admin_of)]
"""A route's parameter that makes it one for admins."""


def new_request_id() -> str:
    return uuid.uuid4().hex
