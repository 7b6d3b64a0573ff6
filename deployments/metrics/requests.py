"""What the ingress sees of requests: each generation on its way to a replica, and each HTTP response.

`MeasuredGateway` and `MeasuredApp` stand around what they measure and change nothing of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.table import AliasKey
from cluster.view import TableView
from deployments.gateway import EngineGateway, ReplicaOutputs
from deployments.metrics.top_adapters import OTHER, TopAdapters
from storage.errors import FloraError
from storage.figures import FigureBook, FigureKey, Figures
from storage.identity import DEFAULT_TENANT, AdapterVersion
from workers.engine.request import EngineRequest, FinishReason, RequestOutput

BASE = "base"
"""The label of requests without an adapter, and the tier of what needs none."""
GONE = "gone"
"""How an answer ended that its client did not wait for."""
WAITING, RUNNING = "waiting", "running"
_TOP_ADAPTERS = 20
_GENERATIONS, _PROMPT_TOKENS, _ANSWER_TOKENS = _BY_ADAPTER = (
    "flora_generations_total",
    "flora_prompt_tokens_total",
    "flora_answer_tokens_total",
)


class RequestMetrics:
    """Figures of one ingress. One event loop; `read` and `adapters_under_way` may be called from another thread.

    Args:
        view: where a version's name is found.
        clock: seconds; only differences matter.
    """

    def __init__(self, view: TableView, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._view = view
        self._book = FigureBook()
        self._top = TopAdapters(_TOP_ADAPTERS, clock)
        self._under_way: Counter[tuple[str, str]] = Counter()  # (state, adapter)
        self._names: tuple[Mapping[AliasKey, AdapterVersion], dict[AdapterVersion, str]] = {}, {}

    def read(self) -> Figures:
        """Counts so far, and answers under way."""
        states = dict.fromkeys((WAITING, RUNNING), 0.0)
        for (state, _), count in list(self._under_way.items()):
            states[state] += count
        gauges: dict[FigureKey, float] = {
            ("flora_generations", (state,)): count for state, count in states.items()
        }
        return self._book.read().merged(Figures(gauges=gauges))

    def adapters_under_way(self, state: str) -> list[str]:
        """Adapters of answers in that state: those with a label of their own, then `other`, if any."""
        found = {
            self._top.label(adapter)
            for (each, adapter), count in list(self._under_way.items())
            if each == state and count and adapter != BASE
        }
        return [*sorted(found - {OTHER}), *sorted(found & {OTHER})]

    def responded(self, method: str, route: str, code: int) -> None:
        self._book.count("flora_http_requests_total", method, route, str(code))

    def begin(self, request: EngineRequest) -> Measured:
        adapter = self._adapter_of(request)
        loser = None if adapter == BASE else self._top.asked(adapter)
        if loser is not None:
            for name in _BY_ADAPTER:
                self._book.fold(name, (loser,), (OTHER,))
        return Measured(self, self._book, request, adapter)

    def label(self, adapter: str) -> str:
        """Under which label an adapter counts now; it may lose it before its answer is whole."""
        return adapter if adapter == BASE else self._top.label(adapter)

    def move(self, adapter: str, before: str | None, after: str | None) -> None:
        """An answer's state changed; None: not begun, or over."""
        if before is not None:
            self._under_way[before, adapter] -= 1
            if not self._under_way[before, adapter]:
                del self._under_way[before, adapter]
        if after is not None:
            self._under_way[after, adapter] += 1

    def _adapter_of(self, request: EngineRequest) -> str:
        """Its name as the table has it; `other` for a version that no alias serves."""
        version = request.adapters.version
        if version is None:
            return BASE
        serving = self._view.table.serving
        if self._names[0] is not serving:
            self._names = serving, {served: _shown(key) for key, served in serving.items()}
        return self._names[1].get(version, OTHER)


class Measured:
    """One generation at one replica, from the ingress to its last output."""

    def __init__(
        self, metrics: RequestMetrics, book: FigureBook, request: EngineRequest, adapter: str
    ) -> None:
        self._metrics = metrics
        self._book = book
        self._adapter = adapter
        self._began_s = metrics.clock()
        self._token_s: float | None = None  # when the last token came
        self._state: str | None = None
        self._reason = GONE
        self._to(WAITING)
        label = metrics.label(adapter)
        book.count(_GENERATIONS, label)
        book.count(_PROMPT_TOKENS, label, by=float(len(request.prompt_token_ids)))

    def took(self, batch: ReplicaOutputs) -> None:
        now_s = self._metrics.clock()
        if self._state == WAITING:
            self._to(RUNNING)
            self._first(batch.outputs[0], now_s)
        tokens = sum(len(output.new_token_ids) for output in batch.outputs)
        if tokens:
            label = self._metrics.label(self._adapter)
            self._book.count(_ANSWER_TOKENS, label, by=float(tokens))
            since_s, self._token_s = self._token_s, now_s
            if since_s is not None:
                self._book.observe(
                    "flora_inter_token_seconds", (now_s - since_s) / tokens, times=tokens
                )
        last = batch.outputs[-1]
        if last.finish_reason is FinishReason.ERROR:
            self._reason = _code(last.error)
        elif last.finish_reason is not None:
            self._reason = last.finish_reason.value

    def failed(self, error: FloraError) -> None:
        self._reason = error.code

    def over(self) -> None:
        self._to(None)
        self._book.count("flora_generations_ended_total", self._reason)

    def _first(self, output: RequestOutput, now_s: float) -> None:
        if output.error is not None:
            return
        tier = output.adapter_tier or BASE
        if output.queue_time_s is not None:
            self._book.observe("flora_queue_seconds", output.queue_time_s, tier)
        self._book.observe("flora_first_token_seconds", now_s - self._began_s, tier)

    def _to(self, state: str | None) -> None:
        self._metrics.move(self._adapter, self._state, state)
        self._state = state


@dataclass(frozen=True, slots=True)
class MeasuredGateway:
    """An `EngineGateway` that measures what passes through another."""

    gateway: EngineGateway
    metrics: RequestMetrics

    async def generate(
        self, request: EngineRequest, avoided: str = "", is_whole: bool = False
    ) -> AsyncGenerator[ReplicaOutputs, None]:
        measured = self.metrics.begin(request)
        try:
            async with aclosing(self.gateway.generate(request, avoided, is_whole)) as batches:
                async for batch in batches:
                    measured.took(batch)
                    yield batch
        except FloraError as error:
            measured.failed(error)
            raise
        finally:
            measured.over()

    async def is_anyone_there(self) -> bool:
        return await self.gateway.is_anyone_there()


class MeasuredApp:
    """ASGI middleware: counts responses by route and status code."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(*_asked(scope), message["status"])
            await send(message)

        await self._app(scope, receive, counted)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _asked(scope: Scope) -> tuple[str, str]:
    """Method and route, the latter as it is declared: what a client may invent is no label."""
    method = scope["method"] if scope["method"] in _METHODS else OTHER
    route: Any = scope.get("route")
    return method, str(getattr(route, "path", OTHER))


def _shown(key: AliasKey) -> str:
    """An adapter's name for an operator, who sees all tenants."""
    tenant, name, _ = key
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def _code(error: Exception | None) -> str:
    return error.code if isinstance(error, FloraError) else FloraError.code
