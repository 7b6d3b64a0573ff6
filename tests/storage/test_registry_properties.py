"""Whatever is done to a registry, it answers like a few dictionaries would."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storage.errors import UnknownModelError
from storage.identity import AdapterName, AdapterVersion
from storage.local_store import LocalObjectStore
from storage.registry import Registry
from tests.storage.versions import publish, version_of

pytestmark = pytest.mark.usefixtures("undurable")

_NAMES = st.sampled_from([AdapterName("a", "x"), AdapterName("a", "x-1"), AdapterName("b", "x")])
_TEXTS = st.sampled_from(["one", "two", "three"])
_ALIASES = st.sampled_from(["latest", "prod"])


class RegistryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(LocalObjectStore(Path(self.folder.name)))
        self.versions: dict[AdapterName, set[AdapterVersion]] = {}
        self.aliases: dict[AdapterName, dict[str, AdapterVersion]] = {}
        self.moves: dict[tuple[AdapterName, str], int] = {}
        self.generation = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def point(self, name: AdapterName, alias: str, version: AdapterVersion) -> None:
        aliases = self.aliases.setdefault(name, {})
        if aliases.get(alias) != version:
            aliases[alias] = version
            self.moves[name, alias] = self.moves.get((name, alias), 0) + 1

    @rule(name=_NAMES, text=_TEXTS, alias=_ALIASES | st.none())
    def publish(self, name: AdapterName, text: str, alias: str | None) -> None:
        version = publish(self.registry, text, name=name, alias=alias)
        assert version == version_of(text)
        self.versions.setdefault(name, set()).add(version)
        if alias is not None:
            self.point(name, alias, version)

    @rule(name=_NAMES, text=_TEXTS, alias=_ALIASES)
    def move_alias(self, name: AdapterName, text: str, alias: str) -> None:
        version = version_of(text)
        if version in self.versions.get(name, set()):
            self.registry.move_alias(name, alias, version)
            self.point(name, alias, version)
        else:
            with pytest.raises(UnknownModelError):
                self.registry.move_alias(name, alias, version)

    @rule(name=_NAMES)
    def delete(self, name: AdapterName) -> None:
        if self.versions.get(name):
            self.registry.delete(name)
        else:
            with pytest.raises(UnknownModelError):
                self.registry.delete(name)
        self.versions.pop(name, None)
        self.aliases.pop(name, None)

    @rule(name=_NAMES, selector=_ALIASES | _TEXTS.map(version_of))
    def resolve(self, name: AdapterName, selector: str) -> None:
        expected = self.aliases.get(name, {}).get(selector)
        if selector in self.versions.get(name, set()):
            expected = AdapterVersion(selector)
        if expected is None:
            with pytest.raises(UnknownModelError):
                self.registry.resolve(name, selector)
        else:
            assert self.registry.resolve(name, selector) == expected

    @invariant()
    def agrees(self) -> None:
        assert self.registry.names() == sorted(self.versions)
        for name, versions in self.versions.items():
            assert {manifest.version for manifest in self.registry.versions(name)} == versions
            found = self.registry.aliases(name)
            assert {alias: record.version for alias, record in found.items()} == (
                self.aliases.get(name, {})
            )
            for alias, record in found.items():
                assert record.generation == self.moves[name, alias]

    @invariant()
    def never_goes_back(self) -> None:
        generation = self.registry.generation()
        assert generation >= self.generation
        self.generation = generation


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
