"""Which adapter version a request's `model` means: by the placement table, else by the registry's own word.

An adapter answers as soon as it is published, before any table knows it. A name nobody knows is asked of the registry
at most once a second. There is no fall-back to the base model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.published import facts_of
from cluster.table import AdapterFacts, AliasKey
from cluster.view import TableView
from storage.errors import InvalidRequestError, StoreUnavailableError, UnknownModelError
from storage.identity import AdapterName, AdapterSet, AdapterVersion, ModelName, parse_model_id
from storage.registry import Registry

ASK_AGAIN_S = 1.0
"""How long the registry's answer for a name stands, a negative one included."""
_MAX_ANSWERS = 10_000


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a request uses. `work_per_token` is 1 for the base model, 1 + the adapter's rows else."""

    adapters: AdapterSet
    work_per_token: float


BASE_MODEL = ResolvedModel(AdapterSet(), 1.0)


def _adapter(version: AdapterVersion, facts: AdapterFacts) -> ResolvedModel:
    return ResolvedModel(AdapterSet.of(version), facts.work_per_token)


@dataclass(frozen=True, slots=True)
class _Asked:
    at_s: float
    answer: asyncio.Task[ResolvedModel]


class ModelNames:
    """Resolves model names. One event loop.

    Args:
        table_ttl_s: a table heard of longer ago is asked only when the registry is away.
        on_news: called, from any thread, when the registry knows a name that the table does not.
        clock: seconds; only differences matter.
    """

    def __init__(
        self,
        view: TableView,
        registry: Registry,
        base_id: str,
        table_ttl_s: float,
        on_news: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._registry = registry
        self._base_id = base_id
        self._table_ttl_s = table_ttl_s
        self._on_news = on_news
        self._clock = clock
        self._asked: dict[tuple[str, str], _Asked] = {}
        self._names: tuple[Mapping[AliasKey, AdapterVersion], frozenset[tuple[str, str]]] = (
            {},
            frozenset(),
        )

    async def resolve(self, model: str, tenant: str) -> ResolvedModel:
        """The adapters that `model` means for a tenant.

        Raises:
            UnknownModelError: nothing of that name; the message has the name, `param` is `model`.
            AmbiguousModelError: it names both the base and an adapter, or several versions.
            InvalidRequestError: an empty version, or a version of the base model.
            StoreUnavailableError: only the registry could tell, and it is away.
        """
        is_fresh = self._view.age_s <= self._table_ttl_s
        known = self._in_table(model, tenant) if is_fresh else None
        if known is not None:
            return known
        try:
            return await self._ask_registry(model, tenant)
        except StoreUnavailableError:
            known = self._in_table(model, tenant)
            if known is None:
                raise
            return known

    def _in_table(self, model: str, tenant: str) -> ResolvedModel | None:
        """None when the table has no such name, alias or version."""
        table = self._view.table
        names = self._names_in(table.serving)
        try:
            name = parse_model_id(model, self._base_id, lambda text: (tenant, text) in names)
        except UnknownModelError:
            return None
        if name.adapter is None:
            return BASE_MODEL
        version = table.serving.get((tenant, name.adapter, name.selector))
        facts = table.facts.get(version) if version else None
        return _adapter(version, facts) if version and facts else None

    def _names_in(self, serving: Mapping[AliasKey, AdapterVersion]) -> frozenset[tuple[str, str]]:
        if self._names[0] is not serving:
            self._names = serving, frozenset((tenant, name) for tenant, name, _ in serving)
        return self._names[1]

    async def _ask_registry(self, model: str, tenant: str) -> ResolvedModel:
        """One question at a time for each name; its answer stands for a second."""
        now_s = self._clock()
        asked = self._asked.get((tenant, model))
        if asked is None or (asked.answer.done() and now_s - asked.at_s >= ASK_AGAIN_S):
            if len(self._asked) >= _MAX_ANSWERS:
                self._forget(now_s)
            task = asyncio.create_task(asyncio.to_thread(self._in_registry, model, tenant))
            # Whoever asked may be gone by then.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            asked = self._asked[tenant, model] = _Asked(now_s, task)
        return await asyncio.shield(asked.answer)

    def _forget(self, now_s: float) -> None:
        self._asked = {
            key: asked for key, asked in self._asked.items() if now_s - asked.at_s < ASK_AGAIN_S
        }

    def _in_registry(self, model: str, tenant: str) -> ResolvedModel:
        def exists(text: str) -> bool:
            try:
                adapter = AdapterName(tenant, text)
            except InvalidRequestError:  # no adapter can have such a name
                return False
            # `resolve` below finds out for every name but the base model's, which it is not called for.
            return text != self._base_id or bool(self._registry.versions(adapter))

        name: ModelName = parse_model_id(model, self._base_id, exists)
        if name.adapter is None:
            return BASE_MODEL
        version = self._registry.resolve(AdapterName(tenant, name.adapter), name.selector)
        resolved = _adapter(version, facts_of(self._registry.content(version)))
        self._on_news()
        return resolved
