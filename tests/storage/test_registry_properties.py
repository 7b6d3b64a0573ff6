"""Whatever is done to a registry, it answers like a few dictionaries would."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storage import layout
from storage.collection import Collector
from storage.errors import AdapterCorruptError, InvalidRequestError, UnknownModelError
from storage.identity import AdapterName, AdapterVersion, sha256_hex
from storage.local_store import LocalObjectStore
from storage.quarantine import is_undamaged
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
        self.store = LocalObjectStore(Path(self.folder.name))
        self.registry = Registry(self.store)
        self.versions: dict[AdapterName, set[AdapterVersion]] = {}
        # Every move ever, and how many of them a delete of the adapter took away.
        self.moves: dict[tuple[AdapterName, str], list[AdapterVersion]] = {}
        self.buried: dict[tuple[AdapterName, str], int] = {}
        self.damaged: set[AdapterVersion] = set()
        self.quarantined: set[AdapterVersion] = set()
        self.pins: dict[AdapterName, int] = {}
        self.generation = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    def meant(self, name: AdapterName, alias: str) -> list[AdapterVersion]:
        """What an alias means and meant, newest first, without deleted versions."""
        moves = self.moves.get((name, alias), [])[self.buried.get((name, alias), 0) :]
        live = [each for each in reversed(moves[-17:]) if each in self.versions.get(name, ())]
        return list(dict.fromkeys(live))

    def point(self, name: AdapterName, alias: str, version: AdapterVersion) -> None:
        moves = self.moves.setdefault((name, alias), [])
        if self.meant(name, alias)[:1] != [version]:
            moves.append(version)

    @rule(name=_NAMES, text=_TEXTS, alias=_ALIASES | st.none())
    def publish(self, name: AdapterName, text: str, alias: str | None) -> None:
        version = publish(self.registry, text, name=name, alias=alias)
        assert version == version_of(text)
        self.damaged.discard(version)
        self.quarantined.discard(version)
        self.versions.setdefault(name, set()).add(version)
        if alias is not None:
            self.point(name, alias, version)

    @rule(name=_NAMES, text=_TEXTS, alias=_ALIASES)
    def move_alias(self, name: AdapterName, text: str, alias: str) -> None:
        version = version_of(text)
        if version not in self.versions.get(name, set()):
            with pytest.raises(UnknownModelError):
                self.registry.move_alias(name, alias, version)
        elif version in self.quarantined:
            with pytest.raises(AdapterCorruptError):
                self.registry.move_alias(name, alias, version)
        else:
            self.registry.move_alias(name, alias, version)
            self.point(name, alias, version)

    @rule(name=_NAMES, alias=_ALIASES)
    def roll_back(self, name: AdapterName, alias: str) -> None:
        meant = self.meant(name, alias)
        good = [version for version in meant[1:] if version not in self.quarantined]
        if not meant:
            with pytest.raises(UnknownModelError):
                self.registry.roll_back(name, alias)
        elif not good:
            with pytest.raises(InvalidRequestError):
                self.registry.roll_back(name, alias)
        else:
            assert self.registry.roll_back(name, alias).version == good[0]
            self.moves[name, alias].append(good[0])

    @rule(name=_NAMES)
    def delete(self, name: AdapterName) -> None:
        if not self.versions.get(name):
            with pytest.raises(UnknownModelError):
                self.registry.delete(name)
            return
        self.registry.delete(name)
        del self.versions[name]
        self.pins.pop(name, None)
        for key, moves in self.moves.items():
            if key[0] == name:
                self.buried[key] = len(moves)

    @rule(name=_NAMES, text=_TEXTS)
    def delete_version(self, name: AdapterName, text: str) -> None:
        version, there = version_of(text), self.versions.get(name, set())
        if any(self.meant(name, alias)[:1] == [version] for alias in ("latest", "prod")):
            with pytest.raises(InvalidRequestError):
                self.registry.delete_version(name, version)
        elif version not in there:
            with pytest.raises(UnknownModelError):
                self.registry.delete_version(name, version)
        else:
            self.registry.delete_version(name, version)
            there.discard(version)
            if not there:
                del self.versions[name]

    @rule(text=_TEXTS)
    def damage(self, text: str) -> None:
        if any(version_of(text) in there for there in self.versions.values()):
            self.store.put(layout.blob(sha256_hex(text.encode())), b"?")
            self.damaged.add(version_of(text))

    @rule(text=_TEXTS)
    def quarantine(self, text: str) -> None:
        version = version_of(text)
        if any(version in there for there in self.versions.values()):
            assert self.registry.quarantine(version, "damaged") == (version in self.damaged)
            self.quarantined |= {version} & self.damaged

    @rule(name=_NAMES, copies=st.integers(1, 3))
    def pin(self, name: AdapterName, copies: int) -> None:
        if self.versions.get(name):
            self.registry.pin(name, copies)
            self.pins[name] = copies
        else:
            with pytest.raises(UnknownModelError):
                self.registry.pin(name, copies)

    @rule(name=_NAMES)
    def unpin(self, name: AdapterName) -> None:
        self.registry.unpin(name)
        self.pins.pop(name, None)

    @rule()
    def collect(self) -> None:
        Collector(self.registry, self.store, grace_s=0.0, clock=lambda: time.time() + 5.0).collect()
        needed = {version for there in self.versions.values() for version in there}
        for version in needed - self.damaged:
            assert is_undamaged(self.store, version)
        blobs = {each.key.removeprefix(layout.BLOBS) for each in self.store.list(layout.BLOBS)}
        assert needed <= blobs and len(blobs) == 2 * len(needed) + bool(needed)

    @rule(name=_NAMES, selector=_ALIASES | _TEXTS.map(version_of))
    def resolve(self, name: AdapterName, selector: str) -> None:
        found = self.meant(name, selector)
        if selector in self.versions.get(name, set()):
            found = [AdapterVersion(selector)]
        good = [version for version in found if version not in self.quarantined]
        if not found:
            with pytest.raises(UnknownModelError):
                self.registry.resolve(name, selector)
        elif not good:
            with pytest.raises(AdapterCorruptError):
                self.registry.resolve(name, selector)
        else:
            assert self.registry.resolve(name, selector) == good[0]

    @invariant()
    def agrees(self) -> None:
        index = self.registry.index()
        assert list(index.adapters) == sorted(self.versions)
        assert index.quarantined.keys() == self.quarantined
        for name, versions in self.versions.items():
            assert {manifest.version for manifest in self.registry.versions(name)} == versions
            entry = index.adapters[name]
            assert {summary.version for summary in entry.versions} == versions
            assert entry.pinned_copies == self.pins.get(name, 0)
            expected = {alias: self.meant(name, alias) for alias in ("latest", "prod")}
            found = self.registry.aliases(name)
            for alias, meant in expected.items():
                assert (alias in found) == (alias in entry.aliases) == bool(meant)
                if meant:
                    assert found[alias].version == entry.aliases[alias].version == meant[0]
                    assert entry.aliases[alias].earlier == tuple(meant[1:])

    @invariant()
    def never_goes_back(self) -> None:
        generation = self.registry.generation()
        assert generation >= self.generation
        self.generation = generation


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
