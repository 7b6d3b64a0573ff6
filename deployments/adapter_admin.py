"""Changes to the adapters for callers over HTTP: each goes through the registry, and is then told to whoever serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from deployments.adapter_sources import AdapterSources
from deployments.errors import AlreadyLoadedError, NameTakenError
from deployments.last_good import LastGood
from deployments.model_list import ModelList
from storage.base_checkpoint import BaseFacts
from storage.errors import StoreUnavailableError
from storage.identity import (
    DEFAULT_ALIAS,
    AdapterName,
    AdapterVersion,
    checked_version,
    is_version,
)
from storage.manifest import AliasRecord, Manifest
from storage.publishing import publish_adapter
from storage.registry import Registry


class AdapterAdmin:
    """Every method blocks, may be called from any thread, and raises what the registry's of the same name raises.

    Args:
        read_base: the facts of the served base; slow, asked once.
        sources: where adapters may be taken from.
        models: follows every change before the change's method returns.
        on_change: called after every change; must not block for long.
        max_bytes: of one adapter.
    """

    def __init__(
        self,
        registry: Registry,
        base_id: str,
        read_base: Callable[[], BaseFacts],
        sources: AdapterSources,
        models: LastGood[ModelList],
        on_change: Callable[[], None],
        max_bytes: int,
    ) -> None:
        self._registry = registry
        self._base_id = base_id
        self._read_base = read_base
        self._base: BaseFacts | None = None
        self._reading_base = threading.Lock()
        self._sources = sources
        self._models = models
        self._on_change = on_change
        self._max_bytes = max_bytes

    def publish(
        self, name: AdapterName, files: Mapping[str, bytes], alias: str | None, source: str
    ) -> Manifest:
        """Check an adapter's files and publish them.

        Raises:
            NameTakenError: the base model is called that.
            Whatever `publish_adapter` raises.
        """
        self._check_name(name)
        return self._publish(name, files, alias, source)

    def _publish(
        self, name: AdapterName, files: Mapping[str, bytes], alias: str | None, source: str
    ) -> Manifest:
        manifest = publish_adapter(
            self._registry,
            name,
            files,
            self._base_facts(),
            alias=alias,
            source=source,
            max_bytes=self._max_bytes,
        )
        self.announce()
        return manifest

    def register(self, name: AdapterName, location: str, alias: str | None) -> Manifest:
        """Publish the adapter at a directory or S3 prefix. Raises also what `AdapterSources.read` raises."""
        self._check_name(name)
        return self._publish(name, self._sources.read(location), alias, source="import")

    def load(self, name: AdapterName, location: str, *, in_place: bool) -> None:
        """`register` the latest version. Raises AlreadyLoadedError if there is such an adapter, unless `in_place`."""
        if not in_place and self.exists(name):
            raise AlreadyLoadedError(
                f"The lora adapter '{name.name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True.",
                param="lora_name",
            )
        self.register(name, location, DEFAULT_ALIAS)

    def exists(self, name: AdapterName) -> bool:
        """Whether an alias of the adapter means anything."""
        return bool(self._registry.aliases(name))

    def move_alias(self, name: AdapterName, alias: str, selector: str) -> AliasRecord:
        """Let an alias mean the version that `selector` means now."""
        record = self._registry.move_alias(name, alias, self._version(name, selector))
        self.announce()
        return record

    def roll_back(self, name: AdapterName, alias: str) -> AliasRecord:
        record = self._registry.roll_back(name, alias)
        self.announce()
        return record

    def pin(self, name: AdapterName, copies: int) -> None:
        self._registry.pin(name, copies)
        self.announce()

    def unpin(self, name: AdapterName) -> None:
        self._registry.unpin(name)
        self.announce()

    def delete(self, name: AdapterName) -> None:
        self._registry.delete(name)
        self.announce()

    def delete_version(self, name: AdapterName, selector: str) -> AdapterVersion:
        version = self._version(name, selector)
        self._registry.delete_version(name, version)
        self.announce()
        return version

    def _version(self, name: AdapterName, selector: str) -> AdapterVersion:
        """A whole version is taken as it is, also one in quarantine."""
        if is_version(selector):
            return checked_version(selector)
        return self._registry.resolve(name, selector)

    def _check_name(self, name: AdapterName) -> None:
        if name.name == self._base_id:
            raise NameTakenError(f"{name.name!r} is the name of the base model", param="name")

    def _base_facts(self) -> BaseFacts:
        with self._reading_base:
            self._base = self._base or self._read_base()
            return self._base

    def announce(self) -> None:
        """Tell whoever serves that the registry has something new."""
        self._on_change()
        with suppress(StoreUnavailableError):  # the change is made; the list follows it later
            self._models.refresh()
