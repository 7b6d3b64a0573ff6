"""Which version each alias serves, which it is moving to, and what it has left behind.

Pure; the placement manager says when a move may be completed. The registry's alias says what is *desired*; the
*target* is that version, or the newest good one of the alias's history while the desired one is bad.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cluster.table import AliasKey
from storage.history import newest_good
from storage.identity import AdapterVersion

RETIRE_S = 10.0
"""How long a version that no alias serves any more is freed wherever it turns up, and demand for it counts for its
successor: requests that were resolved before the flip, and readers whose table is old, still name it. Whoever asks
for it later means it."""


@dataclass(frozen=True, slots=True)
class Flip:
    """An alias's move from a version that no other alias serves."""

    old: AdapterVersion
    new: AdapterVersion


@dataclass(slots=True)
class _Retired:
    since_s: float
    heir: AdapterVersion | None = None


class ServingVersions:
    """Not thread-safe: one caller at a time.

    Args:
        clock: seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._desired: Mapping[AliasKey, AdapterVersion] = {}
        self._serving: dict[AliasKey, AdapterVersion] = {}
        self._moving: dict[AliasKey, AdapterVersion] = {}
        self._since_s: dict[AdapterVersion, float] = {}  # successors: when their move began
        self._current: set[AdapterVersion] = set()
        self._retired: dict[AdapterVersion, _Retired] = {}

    # What is.

    @property
    def serving(self) -> Mapping[AliasKey, AdapterVersion]:
        """Not altered by later calls, which make new ones."""
        return self._serving

    def predecessors(self) -> dict[AdapterVersion, set[AdapterVersion]]:
        """Successor → versions that some alias serves until it flips."""
        moves: dict[AdapterVersion, set[AdapterVersion]] = {}
        for key, new in self._moving.items():
            moves.setdefault(new, set()).add(self._serving[key])
        return moves

    @property
    def retired(self) -> Collection[AdapterVersion]:
        """Versions to be freed. Valid until the next change."""
        return self._retired.keys()

    def heir(self, version: AdapterVersion) -> AdapterVersion | None:
        """Whose demand a request for this version is: its own, its successor's, or nobody's."""
        seen = {version}
        while (one := self._retired.get(version)) is not None:
            if one.heir is None or one.heir in seen:
                return None
            version = one.heir
            seen.add(version)
        return version

    # What happens.

    def recall(self, serving: Mapping[AliasKey, AdapterVersion]) -> None:
        """What aliases served under a predecessor. Counts for what `aim` names afterwards."""
        self._serving = dict(serving)
        self._current = set(serving.values())

    def aim(
        self,
        desired: Mapping[AliasKey, AdapterVersion],
        history: Mapping[AliasKey, tuple[AdapterVersion, ...]],
        is_good: Callable[[AdapterVersion], bool],
        is_known: Callable[[AdapterVersion], bool],
    ) -> None:
        """Take the registry's word. New aliases serve at once, deleted ones no longer; others may have to move.

        Without a good version an alias goes on with what it serves, or begins with what is desired. An alias none of
        whose versions is known serves nothing here.
        """
        serving: dict[AliasKey, AdapterVersion] = {}
        moving: dict[AliasKey, AdapterVersion] = {}
        for key, wish in desired.items():
            current = self._serving.get(key)
            if current == wish and is_good(wish):  # nearly all, nearly always
                serving[key] = wish
                continue
            choices = (wish, *history.get(key, ()))
            target = newest_good(choices, is_good)
            if current is None or not (is_known(current) or target):
                current = target or newest_good(choices, is_known)
            if current is not None:
                serving[key] = current
                if target is not None and target != current:
                    moving[key] = target
        self._desired = desired
        self._change(serving, moving, {})

    def flip(
        self,
        is_ready: Callable[[AdapterVersion, AdapterVersion, float], bool],
        among: Collection[AdapterVersion] | None = None,
    ) -> list[Flip]:
        """Complete every move that is ready: asked with the old version, the new one, and the seconds since the first
        alias began to move to that.

        Args:
            among: only moves to one of these; None for all.
        """
        now_s = self._clock()
        done = {
            key: new
            for key, new in (self._moving.items() if among is None or among else ())
            if (among is None or new in among)
            and is_ready(self._serving[key], new, now_s - self._since_s[new])
        }
        if not done:
            return []
        heirs = {self._serving[key]: new for key, new in done.items()}
        serving = {**self._serving, **done}
        moving = {key: new for key, new in self._moving.items() if key not in done}
        self._change(serving, moving, heirs)
        return [Flip(old, new) for old, new in heirs.items() if old not in self._current]

    def retire(self, version: AdapterVersion) -> None:
        """Free a version that some alias has left, unless it is on its way to be served or served."""
        if version not in self._current:
            self._retired.setdefault(version, _Retired(self._clock()))

    def revive(self, version: AdapterVersion) -> bool:
        """Somebody asks for a retired version. True if it is not just a late request, so it is retired no more."""
        one = self._retired.get(version)
        if one is None or self._clock() - one.since_s < RETIRE_S:
            return one is None
        del self._retired[version]
        return True

    def forget_retired(self, is_resident: Callable[[AdapterVersion], bool]) -> None:
        """Drop versions that were retired a while ago and are nowhere now."""
        now_s = self._clock()
        self._retired = {
            version: one
            for version, one in self._retired.items()
            if now_s - one.since_s < RETIRE_S or is_resident(version)
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other."""
        assert self._serving.keys() <= self._desired.keys(), "a deleted alias serves"
        assert self._moving.keys() <= self._serving.keys()
        assert all(self._serving[key] != new for key, new in self._moving.items())
        assert self._current == {*self._serving.values(), *self._moving.values()}
        assert not self._current & self._retired.keys(), "a version in use is retired"
        assert self._since_s.keys() == set(self._moving.values())

    def _change(
        self,
        serving: dict[AliasKey, AdapterVersion],
        moving: dict[AliasKey, AdapterVersion],
        heirs: Mapping[AdapterVersion, AdapterVersion],
    ) -> None:
        now_s = self._clock()
        current = {*serving.values(), *moving.values()}
        for version in self._current - current:
            self._retired[version] = _Retired(now_s, heirs.get(version))
        for version in self._retired.keys() & current:
            del self._retired[version]
        if serving != self._serving:
            self._serving = serving
        self._moving = moving
        self._since_s = {new: self._since_s.get(new, now_s) for new in moving.values()}
        self._current = current
