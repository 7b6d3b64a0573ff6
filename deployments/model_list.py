"""What `/v1/models` lists, as the bytes it is sent in: made once for each state of the registry, not for each request.

An adapter's entry is made again only when the adapter changed, so that among ten thousand one publish costs little.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cluster.published import Published, PublishedAdapter
from storage.identity import SHARED_TENANT, AdapterName, AdapterVersion
from storage.summary import VersionSummary


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One adapter in the list."""

    adapter: PublishedAdapter
    body: bytes  # JSON

    @property
    def id(self) -> str:
        return self.adapter.name.name


@dataclass(frozen=True)
class ModelList:
    """All adapters at one state of the registry, by tenant. Safe from any thread; nothing in it changes."""

    published: Published
    _entries: Mapping[AdapterName, ModelEntry] = field(default_factory=dict)
    _tenants: Mapping[str, Sequence[ModelEntry]] = field(default_factory=dict)  # sorted by id

    @cached_property
    def owners(self) -> Mapping[AdapterVersion, AdapterName]:
        """Version → the adapter it is of; one of them when several have it."""
        return {
            summary.version: name
            for name, adapter in self.published.adapters.items()
            for summary in adapter.versions
        }

    def summary(self, name: AdapterName, version: AdapterVersion) -> VersionSummary | None:
        adapter = self.published.adapters.get(name)
        versions = adapter.versions if adapter is not None else ()
        return next((each for each in versions if each.version == version), None)

    def find(self, tenant: str, name: str) -> PublishedAdapter | None:
        """The adapter a tenant means by a name: its own, else a shared one."""
        for owner in (tenant, SHARED_TENANT):
            entry = self._entries.get(AdapterName(owner, name))
            if entry is not None:
                return entry.adapter
        return None

    def entries(self, tenant: str) -> Sequence[ModelEntry]:
        """What a tenant may use, by name: its own adapters, and the shared ones whose names it does not use itself."""
        own = self._tenants.get(tenant, ())
        shared = self._tenants.get(SHARED_TENANT, ())
        if tenant == SHARED_TENANT or not shared:
            return own
        mine = {entry.id for entry in own}
        return sorted((*own, *(each for each in shared if each.id not in mine)), key=_by_id)


class ModelListReader:
    """Keeps a `ModelList` up with the registry. One caller at a time.

    Args:
        read: what is published; the same object while nothing changed.
        base_id: the parent of every adapter.
    """

    def __init__(self, read: Callable[[], Published], base_id: str) -> None:
        self._read = read
        self._base_id = base_id
        self._last: ModelList | None = None

    def read(self) -> ModelList:
        """The list as of now; the same object while nothing changed. Raises what `read` raises."""
        published = self._read()
        if self._last is None or self._last.published is not published:
            self._last = self._follow(published)
        return self._last

    def _follow(self, published: Published) -> ModelList:
        known = self._last._entries if self._last is not None else {}
        entries: dict[AdapterName, ModelEntry] = {}
        tenants: dict[str, list[ModelEntry]] = {}
        for name, adapter in published.adapters.items():
            entry = known.get(name)
            if entry is None or entry.adapter is not adapter:
                entry = ModelEntry(adapter, encode(adapter_model(adapter, self._base_id)))
            entries[name] = entry
            tenants.setdefault(name.tenant, []).append(entry)
        for listed in tenants.values():
            listed.sort(key=_by_id)
        return ModelList(published, entries, tenants)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list in the order of its ids."""

    entries: Sequence[ModelEntry]
    has_more: bool


def page_of(entries: Sequence[ModelEntry], after: str | None, limit: int | None) -> Page:
    """What follows the id `after`, which need not be in the list any more; at most `limit` entries."""
    start = 0 if after is None else bisect_right(entries, after, key=_by_id)
    stop = len(entries) if limit is None else start + limit
    return Page(entries[start:stop], has_more=stop < len(entries))


def list_body(
    items: Sequence[bytes], first_id: str | None, last_id: str | None, more: bool
) -> bytes:
    """OpenAI's list object around entries that are JSON already."""
    rest = {"first_id": first_id, "last_id": last_id, "has_more": more}
    return b'{"object":"list","data":[%b],%b' % (b",".join(items), encode(rest)[1:])


def adapter_model(adapter: PublishedAdapter, base_id: str) -> dict[str, Any]:
    """An adapter as OpenAI shows models, with the base as its parent."""
    created_s = max((each.created_s for each in adapter.versions), default=0.0)
    return {
        "id": adapter.name.name,
        "object": "model",
        "created": int(created_s),
        "owned_by": adapter.name.tenant,
        "parent": base_id,
    }


def encode(value: object) -> bytes:
    """JSON as it is sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _by_id(entry: ModelEntry) -> str:
    return entry.id
