"""Which adapter version a request's `model` means: by the placement table, else by the registry's own word.

An adapter answers as soon as it is published, before any table knows it. A name nobody knows is asked of the registry
at most once a second. A tenant's own adapter comes before a shared one of the same name. There is no fall-back to the
base model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.published import Published, PublishedAdapter, facts_of
from cluster.table import AdapterFacts, PlacementTable
from cluster.view import TableView
from storage.errors import (
    AdapterCorruptError,
    AmbiguousModelError,
    StoreUnavailableError,
)
from storage.identity import (
    DEFAULT_ALIAS,
    SHARED_TENANT,
    VERSION_PREFIX,
    VERSION_START,
    AdapterName,
    AdapterSet,
    AdapterVersion,
    is_name,
    parse_model_id,
)
from storage.registry import Registry

ASK_AGAIN_S = 1.0
"""How long the registry's answer for a name stands, a negative one included."""
_MAX_ANSWERS = 10_000


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a request uses. `work_per_token` is 1 for the base model, 1 + the adapter's rows else."""

    adapters: AdapterSet
    work_per_token: float
    name: AdapterName | None = None  # None: the base model


BASE_MODEL = ResolvedModel(AdapterSet(), 1.0)


def _adapter(name: AdapterName, version: AdapterVersion, facts: AdapterFacts) -> ResolvedModel:
    return ResolvedModel(AdapterSet.of(version), facts.work_per_token, name)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An adapter by the names it may have, the tenant's own first, and what selects its version."""

    model: str
    names: tuple[AdapterName, ...]
    selector: str


@dataclass(frozen=True, slots=True)
class _Asked:
    at_s: float
    answer: asyncio.Task[ResolvedModel]


class ModelNames:
    """Resolves model names, in a time that does not grow with how many there are. One event loop.

    Args:
        published: what is known to be published, possibly a moment old; None while nothing was read.
        table_ttl_s: a table heard of longer ago is asked only when the registry is away.
        on_news: called, from any thread, when the registry knows a name that the table does not.
        clock: seconds; only differences matter.
    """

    def __init__(
        self,
        view: TableView,
        registry: Registry,
        published: Callable[[], Published | None],
        base_id: str,
        table_ttl_s: float,
        on_news: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view = view
        self._registry = registry
        self._published = published
        self._base_id = base_id
        self._table_ttl_s = table_ttl_s
        self._on_news = on_news
        self._clock = clock
        self._asked: dict[tuple[str, str], _Asked] = {}

    async def resolve(self, model: str, tenant: str) -> ResolvedModel:
        """The adapters that `model` means for a tenant.

        Raises:
            UnknownModelError: nothing of that name; the message has the name, `param` is `model`.
            AmbiguousModelError: it names both the base and an adapter, or several versions.
            InvalidRequestError: an empty version, or a version of the base model.
            AdapterCorruptError: it names a version that is in quarantine; the message says why.
            StoreUnavailableError: only the registry could tell, and it is away.
        """
        wanted = self._parse(model, tenant)
        if wanted is None:
            return BASE_MODEL
        is_fresh = self._view.age_s <= self._table_ttl_s
        table = self._view.table
        known = self._known(wanted, table if is_fresh else None, self._published())
        if known is not None:
            return known
        try:
            return await self._ask_registry(wanted, tenant)
        except StoreUnavailableError:
            known = self._known(wanted, table, None)
            if known is None:
                raise
            return known

    def forget(self) -> None:
        """Ask the registry anew for every name: something was published here."""
        self._asked.clear()

    def _parse(self, model: str, tenant: str) -> _Wanted | None:
        """None for the base model. Whether an adapter exists is found out later, except one called like the base."""
        owners = dict.fromkeys((tenant, SHARED_TENANT))

        def may_exist(text: str) -> bool:
            if text != self._base_id:
                return is_name(text)
            return is_name(text) and any(self._exists(AdapterName(owner, text)) for owner in owners)

        name = parse_model_id(model, self._base_id, may_exist)
        if name.adapter is None:
            return None
        names = tuple(AdapterName(owner, name.adapter) for owner in owners)
        return _Wanted(model, names, name.selector)

    def _exists(self, name: AdapterName) -> bool:
        published = self._published()
        return (published is not None and name in published.adapters) or (
            (name.tenant, name.name, DEFAULT_ALIAS) in self._view.table.serving
        )

    def _known(
        self, wanted: _Wanted, table: PlacementTable | None, published: Published | None
    ) -> ResolvedModel | None:
        """Without asking anybody; None when there is no such name, alias or version in what is at hand.

        What the table has and the list has not is either new or deleted: the registry knows which.
        """
        for name in wanted.names:
            adapter = published.adapters.get(name) if published else None
            if table is not None and (published is None or adapter is not None):
                version = table.serving.get((name.tenant, name.name, wanted.selector))
                facts = table.facts.get(version) if version else None
                if version and facts:
                    return _adapter(name, version, facts)
            if published is not None and adapter is not None:  # and so no shared one of its name
                return _version_of(adapter, wanted.selector, published)
        return None

    async def _ask_registry(self, wanted: _Wanted, tenant: str) -> ResolvedModel:
        """One question at a time for each name; its answer stands for a second."""
        now_s = self._clock()
        asked = self._asked.get((tenant, wanted.model))
        if asked is None or (asked.answer.done() and now_s - asked.at_s >= ASK_AGAIN_S):
            if len(self._asked) >= _MAX_ANSWERS:
                self._forget_old(now_s)
            task = asyncio.create_task(asyncio.to_thread(self._in_registry, wanted))
            # Whoever asked may be gone by then.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            asked = self._asked[tenant, wanted.model] = _Asked(now_s, task)
        return await asyncio.shield(asked.answer)

    def _forget_old(self, now_s: float) -> None:
        self._asked = {
            key: asked for key, asked in self._asked.items() if now_s - asked.at_s < ASK_AGAIN_S
        }

    def _in_registry(self, wanted: _Wanted) -> ResolvedModel:
        # Of shared adapters the list is up to date enough, and a name of the tenant's own hides them.
        own, *shared = wanted.names
        name = own
        if not self._exists(own):
            name = next((each for each in shared if self._exists(each)), own)
        version = self._registry.resolve(name, wanted.selector)
        resolved = _adapter(name, version, facts_of(self._registry.content(version)))
        self._on_news()
        return resolved


def _version_of(
    adapter: PublishedAdapter, selector: str, published: Published
) -> ResolvedModel | None:
    """The version that digits select, as `Registry.resolve` does; None for an alias: the table knows what it serves."""
    if selector in adapter.aliases:
        return None
    digits = selector.removeprefix(VERSION_PREFIX)
    if not VERSION_START.fullmatch(digits):
        return None
    found = [each for each in adapter.versions if each.version.startswith(digits)]
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{len(found)} versions of adapter {adapter.name.name!r} start with {digits}; give more digits",
            param="model",
        )
    for each in found:
        reason = published.quarantined.get(each.version)
        if reason is not None:
            raise AdapterCorruptError(
                f"version {each.version} of adapter {adapter.name.name!r} is in quarantine: {reason}",
                param="model",
            )
        return _adapter(adapter.name, each.version, AdapterFacts(each.pages, each.num_bytes))
    return None
